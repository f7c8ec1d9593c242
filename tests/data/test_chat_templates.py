"""Chat templates of strangers: what they may compute, and how much of it."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import pytest

from mohawkify.data.chat import render_conversation
from mohawkify.data.conversation import Conversation
from mohawkify.errors import DataError
from tests.bytes_tokenizer import bytes_tokenizer

ATTACKS = [
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ self._TemplateReference__context.eval_ctx.environment.overlay() }}",
    "{{ raise_exception.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% extends 'x' %}",
    "{{ messages.clear() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ lipsum(n=100000) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10**10 }}",
    "{{ ['a'] * 10**9 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ 'a' | center(10**10) }}",
    "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(64) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ range(99999) | map('string') | join('x' * 100000) }}",
    "{{ 'a' * 2000000 }}",
    "{{ raise_exception('a' * 1000000) }}",
    "{{ messages[9].role.x }}",
    "{{ 1 / 0 }}",
    "{{ none + 1 }}",
    "{{ '\ud800' }}{{ 1 / 0 }}",
    "{{",
]


@pytest.mark.parametrize("template", ATTACKS, ids=lambda text: text[:40].encode("ascii", "replace").decode())
def test_a_chat_template_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """Two seconds of computing and 300 MB are the most that one conversation may take."""
    monkeypatch.chdir(tmp_path)
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    tokenizer = bytes_tokenizer(chat_template=template)
    began = time.process_time()
    with pytest.raises(DataError, match="row 7: the teacher's chat template") as caught:
        render_conversation(Conversation([{"role": "user", "content": "Hello."}]), tokenizer, "row 7")
    assert time.process_time() - began < 2
    assert len(caught.value.message) < 500
    assert not list(tmp_path.iterdir())
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_long_conversation_is_no_attack() -> None:
    tokenizer = bytes_tokenizer(chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    messages = [{"role": "user", "content": "x" * 1000}] * 4000
    assert len(render_conversation(Conversation(messages), tokenizer, "row 7")) == 4000 * 1007
