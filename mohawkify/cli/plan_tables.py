"""The tables of `mohawkify plan`. Nothing is worked out here."""

from __future__ import annotations

from typing import Any

from mohawkify.cli.tables import count_parameters, short_bytes, short_time
from mohawkify.student.student_spec import memory_text
from mohawkify.text_tables import text_table

PART_NAMES = {"optimizer": "optimiser", "loss": "bands, logits"}  # the others are called as in the JSON


def plan_text(planned: dict[str, Any]) -> str:
    """The tables of a plan, one below the other."""
    teacher, student = planned["teacher"], planned["student"]
    num_mixers = sum(layer["mixer_heads"] > 0 for layer in student["layer_specs"])
    parts = [
        "\n".join(
            [
                f"recipe {planned['recipe']} on {_machine(planned)}",
                f"teacher  {teacher['source']}: {teacher['model_type']}, {count_parameters(teacher)}",
                f"student  {student['name']}: {student['num_parameters']:,} parameters, "
                f"{student['mixer_parameters']:,} of them in {num_mixers} mixers",
            ]
        ),
        _phases(planned),
        _schedule(planned),
        _work(planned),
        _memory(planned),
        _fit(planned),
        _disk(planned),
        "Steps and tokens are exact; FLOPs, memory, disk, time and cost are estimates: see docs/plan.md.",
        "\n".join(f"warning: {warning}" for warning in planned["warnings"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _machine(planned: dict[str, Any]) -> str:
    layout, gpu = planned["layout"], planned["gpu"]
    if gpu is None:
        return str(planned["device"])
    engine = {"single": "one process", "fsdp": "FSDP", "deepspeed": f"DeepSpeed, ZeRO-{layout['zero']}"}
    return f"{layout['num_gpus']} x {gpu['name']} ({engine[layout['engine']]})"


def _phases(planned: dict[str, Any]) -> str:
    rows = [
        (
            row["stage"],
            row["text"],
            f"{row['budget_tokens']:,}",
            f"{row['tokens']:,}",
            f"{row['steps']:,}",
            f"{row['batch_sequences']} x {row['sequence_length']:,}",
            f"{row['tokens_per_step']:,}",
            f"{row['micro_batch_sequences']} x {row['accumulation']}",
        )
        for row in planned["phases"]
    ]
    total = ("total", "", _sum(planned, "budget_tokens"), _sum(planned, "tokens"), _sum(planned, "steps"), "", "", "")
    headings = ("stage", "text", "budget", "tokens", "steps", "batch", "tokens a step", "micro-batches")
    return text_table(headings, [*rows, total], left=2)


def _sum(planned: dict[str, Any], key: str) -> str:
    return f"{sum(row[key] for row in planned['phases']):,}"


def _schedule(planned: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{row['warmup_steps']:,}",
            f"{row['stable_steps']:,}",
            f"{row['decay_steps']:,}",
            _rate(row["learning_rate"]),
            f"{row['floor']:g}",
            f"{row['trainable_parameters']:,}",
        )
        for name, row in planned["stages"].items()
    ]
    return text_table(("stage", "warm-up", "stable", "decay", "peak rate", "floor", "trained parameters"), rows)


def _rate(rate: float | str | None) -> str:
    return f"{rate:g}" if isinstance(rate, float) else rate or ""


def _work(planned: dict[str, Any]) -> str:
    with_cost = planned["cost"] is not None
    rows = [
        (
            name,
            f"{row['teacher_flops']:.3g}",
            f"{row['student_flops']:.3g}",
            short_time(row["seconds"]),
            *([f"{row['cost']:,.2f}"] if with_cost else []),
        )
        for name, row in [*planned["stages"].items(), ("total", planned)]
    ]
    headings = ("stage", "teacher's FLOPs", "student's FLOPs", "time", *(["cost"] if with_cost else []))
    speed = f"{planned['assumed_flops_per_second']:.3g} FLOP/s"
    share = ""
    if planned["gpu"] is not None and planned["gpu"]["flops_per_second"] is not None:
        share = f": --utilisation {planned['utilisation']:g} of the peak is an assumption"
    notes = [
        f"The time is the arithmetic's at {speed} in all{share}; data, communication and measurements come on top."
    ]
    if with_cost:
        notes.append(
            f"The cost is that of {planned['layout']['num_gpus']} GPUs at {planned['price_per_hour']:g} an hour each."
        )
    return "\n".join([text_table(headings, rows), *notes])


def _memory(planned: dict[str, Any]) -> str:
    names = list(next(iter(planned["stages"].values()))["memory"])
    rows = [
        (name, *(short_bytes(row["memory"][part]) if row["memory"][part] else "-" for part in names), _sum_bytes(row))
        for name, row in planned["stages"].items()
    ]
    headings = ("memory" if planned["gpu"] is None else "per GPU", *(PART_NAMES.get(n, n) for n in names), "in all")
    how = (
        "Activations were counted by running one layer of this family without numbers."
        if planned["activations_counted"]
        else "Activations are a rule of thumb, up to a third off."
    )
    return f"{text_table(headings, rows)}\n{how}"


def _sum_bytes(row: dict[str, Any]) -> str:
    return short_bytes(row["memory_bytes"])


def _fit(planned: dict[str, Any]) -> str:
    fit, gpu = planned["fit"], planned["gpu"]
    if fit is None:
        return ""
    found = f"{short_bytes(fit['peak_bytes'])} of {short_bytes(fit['usable_bytes'])} that a plan may fill of its "
    found += f"{short_bytes(gpu['memory_bytes'])}"
    stages = {name: row for name, row in planned["stages"].items() if row["steps"] and row["trainable_parameters"]}
    largest = ", ".join(f"{name} {row['largest_micro_batch'] or 'none'}" for name, row in stages.items())
    largest = f"largest micro-batches that fit: {largest}"
    if fit["fits"]:
        return f"fits the {gpu['name']}: {found}; {largest}"
    rows = [
        (each["change"], short_bytes(each["peak_bytes"]), "yes" if each["fits"] else "no") for each in fit["changes"]
    ]
    together, ending = fit["together"], []
    if together is not None:
        needs = short_bytes(together["peak_bytes"])
        applied = "; ".join(together["changes"])
        ending = [f"none alone; {'it fits' if together['fits'] else 'not even'} with {applied}: {needs}"]
    return "\n".join(
        [
            f"does NOT fit the {gpu['name']}: {found}; {largest}",
            "",
            text_table(("what to change, each alone", "needs", "fits"), rows),
            *ending,
        ]
    )


def _disk(planned: dict[str, Any]) -> str:
    disk, exports = planned["disk_bytes"], planned["export_bytes"]
    free = "" if planned["free_bytes"] is None else f"; {short_bytes(planned['free_bytes'])} are free"
    return "\n".join(
        [
            f"disk: {short_bytes(sum(disk.values()))} (checkpoints {short_bytes(disk['checkpoints'])}, student "
            f"{short_bytes(disk['final'])}, tokens {short_bytes(disk['tokens'])}){free}",
            "an export takes "
            + ", ".join(f"{short_bytes(size)} as {target}" for target, size in exports.items())
            + f"; the student has {memory_text(planned['student'])}",
        ]
    )
