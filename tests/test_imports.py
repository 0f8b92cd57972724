"The direction learner <- cluster <- orchestrator, and the sole importers, read off the syntax trees."

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCHS_OWN = {"torch.optim", "torch.utils.data", "torch.nn.parallel"}
FORBIDDEN = {
    "learner": {"cluster", "orchestrator", "ray", "argparse", "tensorboard", "torch.utils.tensorboard",
                "torch.distributed", "torch.nn.Module", "torch.nn.modules", *TORCHS_OWN},
    "cluster": {"orchestrator", "argparse", "tensorboard", "torch.utils.tensorboard", *TORCHS_OWN},
    "orchestrator": {"torch.distributed", *TORCHS_OWN},
}  # fmt: skip
SOLE = {
    "torch.distributed": {"cluster/comms.py", "cluster/meeting.py"},
    "ray": {"cluster/ray_cluster.py"},
    "tensorboard": {"orchestrator/board.py"},
    "torch.utils.tensorboard": {"orchestrator/board.py"},
}
SOURCES = sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    "Dotted names that a syntax tree imports or uses of torch, `from a import b` giving both `a` and `a.b`."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the direction"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield ast.unparse(node)


def within(name: str, root: str) -> bool:
    "Whether a dotted name is `root` or below it."
    return name == root or name.startswith(root + ".")


def breaches(file: str, tree: ast.AST) -> list[str]:
    "What a file imports and must not."
    names = set(imports(tree))
    found = [f"{file} imports {name}" for name in names for bad in FORBIDDEN[file.split("/")[0]] if within(name, bad)]
    for sole, files in SOLE.items():
        if file not in files:
            found += [f"{file} imports {name}, which is for {sorted(files)}" for name in names if within(name, sole)]
    return found


def test_there_is_something_to_read() -> None:
    assert len(SOURCES) > 30
    for files in SOLE.values():
        assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    assert breaches(str(path.relative_to(ROOT)), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("learner/x.py", "import cluster.gang"),
        ("learner/x.py", "from orchestrator import config"),
        ("learner/x.py", "import ray"),
        ("learner/x.py", "from torch import distributed"),
        ("learner/x.py", "def f():\n    import torch.distributed as dist"),
        ("learner/x.py", "import torch\ntorch.optim.SGD([])"),
        ("learner/x.py", "from torch.nn import Module"),
        ("cluster/x.py", "import orchestrator"),
        ("cluster/x.py", "from ray.util import placement_group"),
        ("cluster/gang.py", "import torch.distributed"),
        ("cluster/ray_gang.py", "import torch.distributed"),
        ("cluster/comms.py", "import ray"),
        ("orchestrator/x.py", "from torch.utils.tensorboard import SummaryWriter"),
        ("orchestrator/x.py", "import torch\ntorch.distributed.barrier()"),
        ("orchestrator/tracker.py", "from torch.utils.data import DataLoader"),
    ],
)
def test_a_breach_is_found(file: str, line: str) -> None:
    assert breaches(file, ast.parse(line))


def test_no_module_is_torchs() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert not any(ast.unparse(base).endswith("nn.Module") for base in node.bases), f"{path}: {node.name}"


@pytest.mark.parametrize("arguments", [["--help"], ["--no-such-flag"]])
def test_the_command_line_needs_neither_torch_nor_ray(arguments: list[str]) -> None:
    script = (
        "import sys\nimport orchestrator.command_line\nfrom orchestrator.launch import main\n"
        f"try:\n    code = main({arguments})\nexcept SystemExit as end:\n    code = end.code\n"
        "loaded = {'torch', 'ray', 'tensorboard', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == (0 if arguments == ["--help"] else 2), done.stderr


def test_a_plain_run_imports_nothing_that_it_does_not_use() -> None:
    script = (
        "import sys, cluster.worker_process, learner.callbacks, orchestrator.fit, orchestrator.session\n"
        "unused = {'ray', 'fastprogress', 'matplotlib', 'sympy', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not unused, unused"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_command_hears_ctrl_c_before_it_imports_much() -> None:
    "Else, in its first half second, Python would answer with a traceback."
    commands = [path.stem for path in SOURCES if "return command(" in path.read_text()]
    assert len(commands) >= 7
    script = f"import sys, {', '.join(f'orchestrator.{name}' for name in commands)}\nassert 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
