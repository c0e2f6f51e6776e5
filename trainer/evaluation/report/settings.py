"""What the runs are: their settings, which code trained them where, and which stores they read."""

from __future__ import annotations

from collections.abc import Sequence

from storage import StoreError, UserError, open_store
from storage.identity import Identity
from trainer.evaluation.report.charts import escaped
from trainer.evaluation.report.methods import Method, differing, setting
from trainer.evaluation.report.run_record import RunRecord
from trainer.evaluation.report.table import NOTHING, Cell, number_cell, table

UNKNOWN = "unknown"
WEIGHTS = "Weights SHA-256"
IDENTITY = ("Encoder", WEIGHTS, "Resolution", "dtype")
SHOWN_OF_HASH = 12
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def in_words(seconds: float) -> str:
    """A time span: 69 s, 12.4 min, 3.1 h, 2.5 d."""
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= 1.5 * size), UNITS[-1])
    value = seconds / size
    return f"{value:.0f} {unit}" if value >= 100 or unit == "s" else f"{value:.1f} {unit}"


def differences(records: Sequence[RunRecord], methods: Sequence[Method]) -> str:
    """HTML: a row a setting that is not the same in every method, a column a method."""
    firsts = [records[method.runs[0]] for method in methods]
    names = [name for name in differing(firsts, also=("steps",)) if name != "seed"]
    seeds = [", ".join(str(records[i].config.seed) for i in method.runs) for method in methods]
    rows = {name: [setting(run, name) for run in firsts] for name in names} | {"seed": seeds}
    columns = {"Setting": [Cell(text=name, key=name) for name in rows]}
    for place, method in enumerate(methods):
        title = method.name
        while title in columns:
            title += " ′"
        columns[title] = [Cell(text=values[place] or NOTHING, key=values[place]) for values in rows.values()]
    return table(columns, label="Settings that differ", sortable=False)


def shared(records: Sequence[RunRecord]) -> str:
    """HTML: what is the same in all runs, folded away."""
    varying = set(differing(records, also=("steps",)))
    same = {name: setting(records[0], name) for name in records[0].settings if name not in varying}
    items = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value) or NOTHING}</dd></div>" for name, value in same.items()
    )
    summary = f"Settings that are the same in every run ({len(same)})" if len(records) > 1 else "Settings"
    return f"<details><summary>{summary}</summary><dl>{items}</dl></details>"


def provenance(records: Sequence[RunRecord], names: Sequence[Cell]) -> str:
    """HTML: which code trained each run, where, and what that took."""
    summaries = [record.summary for record in records]
    columns = {
        "Run": list(names),
        "Parameters": [_counted(summary.parameters) for summary in summaries],
        "Classes": [_counted(_classes(record)) for record in records],
        "Steps": [number_cell(record.steps, ",", note=_unfinished(record)) for record in records],
        "Images seen": [number_cell(record.spent_at(record.steps).images, ",.0f") for record in records],
        "Images/s": [number_cell(record.images_per_s, ".1f") for record in records],
        "Time": [_time(record) for record in records],
        "Device time": [_device_time(record) for record in records],
        "Device": [
            _known(summary.device.upper() if summary.device == "cpu" else summary.device) for summary in summaries
        ],
        "Machine": [_known(summary.machine) for summary in summaries],
        "Version": [_known(summary.version) for summary in summaries],
        "Commit": [_known((summary.commit or "")[:SHOWN_OF_HASH]) for summary in summaries],
    }
    if all(time.key == device.key for time, device in zip(columns["Time"], columns["Device time"], strict=True)):
        columns.pop("Time" if all(record.on_gpu for record in records) else "Device time")
    return table(columns, label="Where the runs are from")


def _known(text: str | None) -> Cell:
    return Cell(text=text or UNKNOWN, key=text or "")


def _counted(value: int | None) -> Cell:
    return Cell(text=UNKNOWN) if value is None else number_cell(value, ",")


def _classes(record: RunRecord) -> int | None:
    return record.summary.classes if record.summary.classes is not None else record.config.model.classes or None


def _time(record: RunRecord) -> Cell:
    seconds = record.spent[-1].seconds
    return Cell(text=in_words(seconds), key=seconds) if record.lines else Cell(text=NOTHING)


def _device_time(record: RunRecord) -> Cell:
    """GPU-hours, or what processes on CPUs took together."""
    if not record.lines:
        return Cell(text=NOTHING)
    seconds = record.spent[-1].device_seconds
    what = {True: "on GPUs", False: "on CPUs", None: "device unknown"}[record.on_gpu]
    ranks = max(line.ranks for line in record.lines)
    text = f"{seconds / 3600:.3g} GPU-hours" if record.on_gpu else in_words(seconds)
    note = f"{ranks} processes {what}" if ranks > 1 else "" if record.on_gpu else what
    return Cell(text=text, key=seconds, note=note)


def _unfinished(run: RunRecord) -> str:
    return "" if run.steps >= run.config.steps else f"of {run.config.steps:,}"


def stores(records: Sequence[RunRecord]) -> str:
    """HTML: the groups of arrays that the runs read, and what they were made from."""
    used: dict[tuple[str, str, str], list[str]] = {}
    for run in records:
        for path, digest in run.identities.items():
            used.setdefault((run.config.store, path, digest), []).append(run.name)
    if not used:
        return "<p>No run has saved a checkpoint yet.</p>"
    columns: dict[str, list[Cell]] = {name: [] for name in ("Group", *IDENTITY, "Identity", "Rows", "Store", "Runs")}
    for (root, path, digest), names in used.items():
        identity, n_rows, note = _identity(root, path, digest)
        columns["Group"].append(Cell(text=path, key=path, note=note))
        of = (identity.encoder, identity.weights_sha256, identity.resolution, identity.dtype)
        for title, known in zip(IDENTITY, of, strict=True):
            value = NOTHING if known is None else str(known)
            columns[title].append(Cell(text=value[:SHOWN_OF_HASH] if title == WEIGHTS else value, key=value))
        columns["Identity"].append(Cell(text=digest[:SHOWN_OF_HASH], key=digest))
        columns["Rows"].append(number_cell(n_rows, ","))
        columns["Store"].append(Cell(text=root, key=root))
        columns["Runs"].append(Cell(text=str(len(names)), key=len(names)))
    return table(columns, label="Stores")


def _identity(root: str, path: str, digest: str) -> tuple[Identity, int | None, str]:
    """The group's identity, its rows, and what is amiss; the page is made without a store that is gone."""
    try:
        store = open_store(root)
        group = store.group(path)
    except (StoreError, UserError, OSError) as error:
        return Identity(), None, f"not there now: {' '.join(str(error).split())[:120]}"
    group.close()
    changed = "" if group.identity_digest == digest else "made anew since these runs"
    return group.identity, store.n_rows, changed
