"""Tables for people: what inspect, plan, doctor and the rest print on standard output. Nothing is worked out here."""

from __future__ import annotations

from typing import Any

from mohawkify.student.student_spec import memory_text
from mohawkify.text_tables import text_table

_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def short_bytes(number: float) -> str:
    """A size in three digits: ``4.94 GB``."""
    for unit, size in _BYTES:
        # Half a unit of the last digit below the border rounds up to it: 999.6 kB is 1.00 MB.
        if number >= size * 0.9995:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"


def short_time(seconds: float) -> str:
    """A duration in its two largest units: ``3 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days < 730 else f"{days / 365:,.0f} years"


def inspection_text(found: dict[str, Any]) -> str:
    """The table of `mohawkify inspect`."""
    teacher, student = found["teacher"], found["student"]
    rows = [
        (
            part["part"],
            "" if part["attention"] is None else part["attention"].removesuffix("_attention"),
            _learning(part),
            _count(part["replaced"]),
            _count(part["mixer"]),
            _count(part["copied"]),
        )
        for part in found["parts"]
    ]
    sums = [_count(sum(part[key] for part in found["parts"])) for key in ("replaced", "mixer", "copied")]
    window = f", sliding window {teacher['sliding_window']:,}" if teacher["sliding_window"] else ""
    headings = ("part", "attention", "learns in", "grafted away", "new mixer", "copied")
    return "\n".join(
        [
            f"{teacher['source']}: {found['family']}, {count_parameters(teacher)}",
            f"{teacher['num_hidden_layers']} layers of width {teacher['hidden_size']:,}; "
            f"{teacher['num_attention_heads']} query heads of {teacher['head_dim']} "
            f"over {teacher['num_key_value_heads']} key heads{window}",
            f"vocabulary {teacher['vocab_size']:,}, made for up to {teacher['max_position_embeddings']:,} tokens"
            + (f"; biases on {', '.join(teacher['attention_biases'])}" if teacher["attention_biases"] else ""),
            "",
            text_table(headings, [*rows, ("total", "", "", *sums)], left=3),
            "",
            f"student: {student['num_parameters']:,} parameters; {memory_text(student)}",
            *(f"note: {sentence}" for sentence in found["notes"]),
        ]
    )


def count_parameters(teacher: dict[str, Any]) -> str:
    """How many there are and, where a router chooses among experts, how many one token meets."""
    everything, active = teacher["num_parameters"], teacher["active_parameters"]
    return f"{everything:,} parameters" + (f", {active:,} of them for one token" if active < everything else "")


def _learning(part: dict[str, Any]) -> str:
    mixer, copied = part["mixer_learns"], part["copied_learns"]
    only_mixer = [stage for stage in mixer if stage not in copied]
    words = [f"{stage} (mixer)" for stage in only_mixer] + list(copied)
    return ", ".join(words) or "-"


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"


def doctor_text(found: dict[str, Any]) -> str:
    """The tables of `mohawkify doctor`."""
    packages = [
        (package["name"], package["installed"] or "missing", package["required"] or "any") for package in found["base"]
    ]
    extras = [(name, _extra_state(extra), extra["brings"]) for name, extra in found["extras"].items()]
    kernels = [(each["name"], each["problem"] or "usable", ", ".join(each["operators"])) for each in found["kernels"]]
    commands = [
        f"to install {name}: {extra['install']}"
        for name, extra in found["extras"].items()
        if extra["packages"] and not extra["complete"]
    ]
    return "\n".join(
        [
            f"mohawkify {found['mohawkify']}, Python {found['python']}, {found['platform']}",
            *(f"device: {device}" for device in found["devices"]),
            "",
            text_table(("package", "installed", "required"), packages, left=3),
            "",
            text_table(("extra", "state", "brings"), extras, left=3),
            "",
            text_table(("kernels", "state", "for"), kernels, left=3),
            "",
            *commands,
        ]
    ).rstrip()


def folder_text(result: dict[str, Any]) -> str:
    """The table of `mohawkify doctor FOLDER`."""
    rows = [(check["name"], "valid" if check["passed"] else f"INVALID: {check['error']}") for check in result["checks"]]
    lines = [f"{result['folder']}: {result['kind']}", "", text_table(("check", "result"), rows, left=2), ""]
    if result["never_read"]:
        lines += [f"never read or run: {', '.join(result['never_read'])}", ""]
    if result["kind"] == "teacher":
        lines += ["A teacher comes without hashes: a value that was changed to another finite one is not noticed.", ""]
    return "\n".join([*lines, "valid" if result["valid"] else "not valid: a command that needs it refuses it"])


def _extra_state(extra: dict[str, Any]) -> str:
    if not extra["packages"]:
        return "not for this system"
    missing = [package["name"] for package in extra["packages"] if not package["fits"]]
    return f"missing {', '.join(missing)}" if missing else "installed"


def tuning_text(found: dict[str, Any]) -> str:
    """The tables of `mohawkify tune`."""
    parts = []
    for stage, test in found.items():
        start = test["start_loss"]
        rows = [("none", f"{start:.4f}", "1.000", "")]
        for row in test["rates"]:
            loss = row["loss"]
            shown = ("not finite", "") if loss is None else (f"{loss:.4f}", f"{loss / start:.3f}")
            rows.append((f"{row['learning_rate']:g}", *shown, "refused" if row["refused"] else ""))
        text = f"{test['steps']} steps at each rate, {test['tokens']:,} tokens in all"
        headings = ("learning rate", "loss", "of the start", "")
        parts.append(
            f"{stage}: {text}\n\n{text_table(headings, rows)}\n\nstages.{stage}.learning_rate={test['learning_rate']:g}"
        )
    return "\n\n".join(parts)


def recipes_text(found: dict[str, Any]) -> str:
    """The table of `mohawkify recipes ls`."""
    rows = [(each["name"], each["teacher"] or "", each["description"]) for each in found["recipes"]]
    return text_table(("recipe", "made for", "description"), rows, left=3)


def families_text(found: dict[str, Any]) -> str:
    """The table of `mohawkify families`."""
    rows = [(name, each["title"], each["examples"][0]) for name, each in found["details"].items()]
    return text_table(("family", "title", "for example"), rows, left=3)
