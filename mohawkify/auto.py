"""``import mohawkify.auto``: transformers' Auto classes then load every student without ``trust_remote_code``."""

from mohawkify.families.registry import adapter_names, load_adapter
from mohawkify.student.save import register_family

for _name in adapter_names():
    register_family(load_adapter(_name))
