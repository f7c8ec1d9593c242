"""What several processes need that one can test: shares of a batch, launchers' variables, errors, random states."""

from __future__ import annotations

import hashlib
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as distributed
from click.testing import CliRunner
from torch import nn

from mohawkify.cli.main import main
from mohawkify.data.corpus import Corpus
from mohawkify.data.loader import SampleRange, batch_at
from mohawkify.distributed.failures import FailureReporter, OtherProcessError, is_lost, lost
from mohawkify.distributed.launch import _exit_code, first_host, rank_from_environment
from mohawkify.distributed.process_group import World
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.errors import CheckpointError, ProcessLostError, RecipeError, TeacherError, UsageError
from mohawkify.recipe.loading import apply_overrides, comparable_text, load_recipe, parse_recipe
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train import loop, preparation
from mohawkify.train.engines.choice import (
    choose_engine,
    ignored_settings,
    require_agreeing_settings,
    require_even_shares,
)
from mohawkify.train.engines.engine import LocalEngine
from mohawkify.train.micro_batch import largest_that_fits, micro_batch_of
from mohawkify.train.rng_state import gather_random_state, restore_random_state
from tests.commands import RECIPE

CPU = torch.device("cpu")
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node[07-08]"}


class Part(World):
    """One of several processes that are not there: sums are its own part."""

    def _reduce(self, numbers: list[float], operation: Any) -> list[float]:
        return numbers


class Reader:
    """A stage that learns a number and remembers what it was given."""

    name = "reader"

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        self.rows: list[torch.Tensor] = []

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def weight(self, batch: Any) -> float:
        return float(len(batch.input_ids))

    def run(self, batch: Any, runner: Any) -> dict[str, torch.Tensor]:
        self.rows += list(batch.input_ids)
        loss = self.module(batch.input_ids.float().mean().view(1)).sum()
        runner.backward(loss)
        return {"loss": loss.detach()}


def engine_of(stage: Reader) -> LocalEngine:
    return LocalEngine(stage.module, stage.parameters(), OptimizerRecipe(), "fp32", CPU)


@pytest.fixture(scope="module")
def ranges() -> list[SampleRange]:
    """Two ranges over 40 sequences and more, which go round more than once."""
    numbers = np.arange(40 * 8, dtype=np.uint32)
    corpus = Corpus(numbers, np.array([0, 100, 320]), "a")
    return [SampleRange(corpus, 12, 8, 0), SampleRange(corpus, 5, 16, 72)]


def passes(objective: Any, batch: Any, world: World, micro_batch: int) -> None:
    conversion = SimpleNamespace(world=world, device=CPU)
    loop.forward_backward(conversion, objective, engine_of(objective), batch, micro_batch, lambda: None)  # type: ignore[arg-type]


def stream(ranges: list[SampleRange], size: int, first_step: int, micro_batch: int) -> str:
    """A hash of all that the processes of a world read together from a step on."""
    digest = hashlib.sha256()
    for step in range(first_step, 17):
        rows = []
        for rank in range(size):
            stage = Reader()
            batch = batch_at(ranges, step, 8, seed=5)
            passes(stage, batch, Part(rank, size), micro_batch)
            rows += stage.rows
        digest.update(torch.stack(rows).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("first_step", [0, 1, 2, 5, 7, 11, 12, 13, 15, 16])
def test_processes_read_the_same_tokens_in_the_same_order_from_any_step_on(ranges, first_step):
    whole = stream(ranges, 1, first_step, 8)
    for size in (2, 4):
        for micro_batch in (1, 2, 8):
            assert stream(ranges, size, first_step, micro_batch) == whole, (size, micro_batch)


def test_the_gradient_of_all_parts_is_that_of_the_batch(ranges):
    gradients = {}
    for size, micro_batch in ((1, 8), (2, 3), (4, 1)):
        stage = Reader()
        nn.init.constant_(stage.module.weight, 0.5)
        for rank in range(size):
            batch = batch_at(ranges, 3, 8, seed=5)
            passes(stage, batch, Part(rank, size), micro_batch)
        gradients[size] = stage.module.weight.grad
    torch.testing.assert_close(gradients[2], gradients[1])
    torch.testing.assert_close(gradients[4], gradients[1])


def test_ranks_are_read_from_the_variables_of_launchers():
    assert rank_from_environment({}) is None
    own = rank_from_environment(TORCHRUN)
    assert own is not None
    assert (own.rank, own.size, own.local_rank, own.address) == (3, 8, 1, None)
    own = rank_from_environment({**SRUN, "SLURM_JOB_ID": "1234567"})
    assert own is not None
    assert (own.rank, own.size, own.local_rank, own.address) == (3, 8, 1, "node07")
    assert own.port == 15_000 + 1234567 % 20_000
    own = rank_from_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    assert own is not None
    assert (own.address, own.port) == ("10.0.0.1", 29500)
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None, (
        "a batch script without srun is one process"
    )


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("node[03-05,9],other", "node03"),
        ("n[1,3]-ib", "n1-ib"),
        ("gpu-1.x", "gpu-1.x"),
    ],
)
def test_the_first_of_slurms_machines(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "0"}, {**TORCHRUN, "RANK": "x"}, {**TORCHRUN, "RANK": "8"}, {**SRUN, "SLURM_STEP_NODELIST": ""}],
    ids=str,
)
def test_variables_that_make_no_sense_are_refused(environment):
    with pytest.raises(UsageError, match="found"):
        rank_from_environment(environment)


def test_files_that_another_machine_has_otherwise_are_refused():
    class Second(World):
        def on_rank0(self, function: Any, heartbeat: Any = None) -> Any:
            return {"model.safetensors": "a"}

    world = Second(rank=8, size=16)
    assert preparation.same_everywhere({"model.safetensors": "a"}, "the teacher", world) == {"model.safetensors": "a"}
    assert preparation.same_everywhere(None, "the teacher", world) == {"model.safetensors": "a"}
    with pytest.raises(TeacherError, match="not what the main process has"):
        preparation.same_everywhere({"model.safetensors": "b"}, "the teacher", world)


def test_processes_must_share_each_batch_evenly():
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    for size in (1, 2, 4):
        require_even_shares(recipe, World(0, size))
    with pytest.raises(
        UsageError, match="3 processes cannot share the 4 sequences of a batch of stage orient"
    ) as error:
        require_even_shares(recipe, World(0, 3))
    assert "1, 2, 4 processes" in str(error.value.hint)
    uneven = apply_overrides(recipe, ["stages.orient.batch_sequences=6", "stages.orient.tokens=192"])
    with pytest.raises(
        UsageError, match="4 processes cannot share the 6 sequences of a batch of stage orient"
    ) as error:
        require_even_shares(uneven, World(0, 4))
    assert "start 1, 2 processes, which divides the batches of all stages" in str(error.value.hint)
    require_even_shares(
        apply_overrides(recipe, [f"stages.{name}.tokens=0" for name in ("orient", "align", "distill")]), World(0, 3)
    )


def test_the_engine_is_the_recipes_and_single_in_one_process():
    compute = load_recipe("llamba-8b").compute
    assert compute.zero == 3
    assert compute.activation_checkpointing
    assert choose_engine(compute, World()) == "single"
    assert choose_engine(compute, World(0, 8)) == "deepspeed"
    recipe = parse_recipe(RECIPE, "tiny.yaml")

    def engine(*overrides: str) -> str:
        return choose_engine(apply_overrides(recipe, overrides).compute, World(0, 2))

    assert engine("compute.engine=fsdp") == "fsdp"
    assert engine("compute.engine=deepspeed", "compute.zero=0") == "deepspeed"
    with pytest.raises(UsageError, match="works in one process, found 2"):
        engine("compute.engine=single")
    with pytest.raises(UsageError, match="zero 2, which the engine fsdp ignores"):
        engine("compute.engine=fsdp", "compute.zero=2")
    offloading = apply_overrides(recipe, ["compute.engine=single", "compute.offload=all"]).compute
    with pytest.raises(UsageError, match="offload all, which the engine single ignores"):
        choose_engine(offloading, World())
    with pytest.raises(UsageError, match="none or all"):
        engine("compute.engine=fsdp", "compute.offload=optimizer")


def test_settings_that_the_chosen_engine_does_not_heed_are_named():
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    compute = apply_overrides(recipe, ["compute.zero=2", "compute.offload=all"]).compute
    assert ignored_settings(compute, "single") == {"zero": 2, "offload": "all"}
    assert ignored_settings(compute, "fsdp") == {"zero": 2}
    assert ignored_settings(compute, "deepspeed") == {}
    assert ignored_settings(apply_overrides(recipe, ["compute.offload=none"]).compute, "single") == {}


@pytest.mark.parametrize("engine", ["fsdp", "single", "deepspeed"])
def test_an_engine_on_the_command_line_goes_with_every_recipe(monkeypatch, engine):
    chosen = []
    monkeypatch.setattr("mohawkify.cli.ranks.start_processes", lambda number: None)
    monkeypatch.setattr(
        "mohawkify.train.trainer.convert",
        lambda teacher, recipe, *more: chosen.append(recipe.compute) or SimpleNamespace(path="run"),
    )
    result = CliRunner().invoke(main, ["convert", "x", "--recipe", "llamba-8b", "--engine", engine])
    assert result.exit_code == 0, result.output
    assert choose_engine(chosen[0], World(0, 1 if engine == "single" else 2)) == engine
    assert chosen[0].zero == (3 if engine == "deepspeed" else None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"train_batch_size": 3}', "train_batch_size: found 3, expected 4"),
        ('{"gradient_accumulation_steps": 7}', "gradient_accumulation_steps: found 7, expected 1"),
        ('{"optimizer": {"params": {"lr": 1}}}', "optimizer.params.lr: found 1, expected 0.001"),
        ("{bad", "settings.json"),
        (None, "there is no file"),
    ],
)
def test_deepspeeds_settings_are_looked_at_before_any_work(tmp_path, settings, message):
    file = tmp_path / "settings.json"
    if settings is not None:
        file.write_text(settings)
    recipe = apply_overrides(parse_recipe(RECIPE, "tiny.yaml"), [f"compute.deepspeed_config={file}"])
    with pytest.raises(RecipeError, match=message):
        require_agreeing_settings(recipe, World(0, 2))
    require_agreeing_settings(recipe, World())  # one process has no use for them


def test_what_follows_from_the_micro_batch_is_compared_when_that_is_known(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"gradient_accumulation_steps": 2}')
    changes = [f"compute.deepspeed_config={file}", "compute.micro_batch_sequences="]
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    for micro_batch in ("auto", "1"):
        require_agreeing_settings(apply_overrides(recipe, [changes[0], changes[1] + micro_batch]), World(0, 2))
    with pytest.raises(RecipeError, match="gradient_accumulation_steps: found 2, expected 1"):
        require_agreeing_settings(apply_overrides(recipe, [changes[0], changes[1] + "2"]), World(0, 2))


def test_what_changes_rounding_only_is_no_part_of_a_runs_identity():
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    free = ("engine=fsdp", "zero=1", "offload=all", "micro_batch_sequences=2", "activation_checkpointing=true")
    for change in (*free, "threads=3", "device=auto", "deepspeed_config=x.json", "shard_teacher=true"):
        assert comparable_text(apply_overrides(recipe, [f"compute.{change}"])) == comparable_text(recipe), change
    for change in ("compute.precision=bf16", "seed=1", "stages.orient.batch_sequences=8", "optimizer.epsilon=1e-7"):
        assert comparable_text(apply_overrides(recipe, [change])) != comparable_text(recipe), change


def test_the_micro_batch_is_halved_until_it_fits(ranges):
    recipe = parse_recipe(RECIPE, "tiny.yaml")
    stage = Reader()
    tried: list[int] = []
    run = stage.run

    def crowded(batch: Any, runner: Any) -> Any:
        tried.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch, runner)

    stage.run = crowded  # type: ignore[method-assign]
    batch = batch_at(ranges, 0, 8, seed=5)
    before = torch.get_rng_state()
    assert largest_that_fits(stage, batch, World(), CPU, lambda micro: engine_of(stage)) == 2  # type: ignore[arg-type]
    assert tried == [8, 4, 2]
    assert stage.module.weight.grad is None, "nothing is learned on the way"
    assert torch.equal(torch.get_rng_state(), before)
    stage.run = lambda batch, runner: crowded(SimpleNamespace(input_ids=range(9)), runner)  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits(stage, batch, World(), CPU, lambda micro: engine_of(stage))  # type: ignore[arg-type]
    stage.block = recipe.stages.orient
    for wanted, size, found in (("auto", 2, 2), ("null", 1, 4), ("4", 4, 1), ("1", 2, 1)):
        own = apply_overrides(recipe, [f"compute.micro_batch_sequences={wanted}"])
        conversion = SimpleNamespace(recipe=own, world=World(0, size), device=CPU)
        whole = loop.Stage("orient", stage, ranges)
        assert micro_batch_of(conversion, whole, lambda micro: engine_of(stage)) == found  # type: ignore[arg-type]


@pytest.fixture
def store() -> distributed.TCPStore:
    return distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_the_first_error_is_said_and_gives_all_the_exit_code(store):
    alarms = [FailureReporter(store.clone(), rank, 3) for rank in range(3)]
    said: list[int] = []
    try:
        alarms[0].raise_if_peer_failed()
        assert alarms[1].report(66, lambda: said.append(1)) == 66
        with pytest.raises(OtherProcessError):
            alarms[0].raise_if_peer_failed()
        assert alarms[0].report(75, lambda: said.append(0)) == 66
        assert alarms[2].report(66, lambda: said.append(2)) == 66
        assert said == [1]
    finally:
        for alarm in alarms:
            alarm.close()


def test_the_others_wait_until_an_error_is_said(store):
    alarms = [FailureReporter(store.clone(), rank) for rank in range(2)]
    order: list[str] = []

    def speak() -> None:
        time.sleep(0.3)
        order.append("said")

    try:
        first = threading.Thread(target=lambda: alarms[0].report(74, speak))
        first.start()
        time.sleep(0.1)
        assert alarms[1].report(75, lambda: order.append("wrong")) == 74
        order.append("left")
        first.join()
        assert order == ["said", "left"]
    finally:
        for alarm in alarms:
            alarm.close()


def test_a_store_that_gives_no_answer_keeps_nobody(monkeypatch):
    """As that of a main process that was stopped."""

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: threading.Event().wait()

    monkeypatch.setattr("mohawkify.distributed.failures._AGREE_SECONDS", 0.3)
    monkeypatch.setattr(FailureReporter, "_watch", lambda self: None)
    said: list[int] = []
    for rank in range(3):
        assert FailureReporter(Silent(), rank).report(75, lambda rank=rank: said.append(rank), "hang") == 75  # type: ignore[arg-type, misc]
    assert said == [0, 1]


def test_those_that_wait_for_the_main_process_get_on_only_as_it_does(store):
    """Else a main process that is stopped while it saves would never be missed."""
    main, second = World(0, 2, 0, store), World(1, 2, 1, store)
    beats: list[float] = []
    waiting = threading.Thread(target=lambda: second.on_rank0(lambda: None, lambda: beats.append(time.monotonic())))
    try:
        waiting.start()
        time.sleep(0.5)
        assert beats == []
        main.heartbeat()
        deadline = time.monotonic() + 30
        while not beats and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(beats) == 1
        main.on_rank0(lambda: None)
        waiting.join()
        assert len(beats) == 1
    finally:
        for world in (main, second):
            assert world.failures is not None
            world.failures.close()


def test_what_a_dead_partner_leaves_behind_is_known():
    assert is_lost(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer"))
    assert is_lost(distributed.DistNetworkError("Failed to recv"))
    assert not is_lost(RuntimeError("size mismatch"))
    assert not is_lost(ValueError("Connection closed by peer"))
    assert isinstance(lost(RuntimeError("x")), ProcessLostError)


def test_exit_codes_of_a_launch():
    said: list[str] = []

    def code(*exit_codes: int, sent: tuple[int, ...] = ()) -> int:
        failures: Any = [SimpleNamespace(exitcode=code, local_rank=rank) for rank, code in enumerate(exit_codes)]
        return _exit_code(failures, 2, sent, lambda message, hint: said.append(message))

    assert code(66, 66) == 66
    assert code(143, -15, sent=(15,)) == 143
    assert code(-9, 75) == 75
    assert said == [], "a process was left to say it"
    assert code(-9, -15) == 75
    assert code(-2, -2, sent=(2, 2)) == 130
    assert said == ["process 1 of 2 was killed by SIGKILL", "stopped by SIGINT"]


def test_random_states_of_other_numbers_of_processes():
    class Two(Part):
        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            return [tensor, other]

    before = torch.get_rng_state()
    try:
        other = torch.Generator().manual_seed(9).get_state()
        torch.manual_seed(4)
        saved = gather_random_state(Two(0, 2))
        assert saved.keys() == {"cpu", "rank-1.cpu"}
        own = torch.rand(3)
        drawn = {}
        for name, world in (("single", World()), ("main", Part(0, 2)), ("second", Part(1, 2)), ("third", Part(2, 4))):
            for _ in range(2):
                restore_random_state(world, saved)
                again = torch.rand(3)
                assert torch.equal(drawn.setdefault(name, again), again), "the same whenever it is continued"
        assert torch.equal(drawn["single"], own)
        assert torch.equal(drawn["main"], own)
        assert torch.equal(drawn["second"], torch.rand(3, generator=torch.Generator().manual_seed(9)))
        assert not torch.equal(drawn["third"], own)
        with pytest.raises(CheckpointError):
            restore_random_state(World(), {"rank-1.cpu": other})
    finally:
        torch.set_rng_state(before)


def test_a_signal_between_two_looks_is_not_lost():
    class Slow(World):
        def max(self, number: float) -> float:
            stop.number = 15  # it comes while the processes agree that there was none
            return number

    stop = Shutdown()
    assert not stop.any_rank(Slow())
    assert stop.number == 15
    assert stop.any_rank(World())


def test_a_launchers_processes_and_ours_must_be_as_many(monkeypatch, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["convert", "x", "--recipe", str(recipe), "--processes", "2"])
    assert done.exit_code == 2
    assert "found --processes 2 in one of 8 processes that a launcher has started" in done.stderr


def test_settings_of_deepspeed_must_be_a_json_object(tmp_path):
    from mohawkify.train.engines.deepspeed_config import read_settings

    for text, says in ((None, "there is no file"), ("{", "settings"), ("[]", "is not a JSON object")):
        file = tmp_path / "settings.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(RecipeError, match=says):
            read_settings(str(file))
