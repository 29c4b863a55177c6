"""Writes the package as a kernel repository, which Hugging Face's `kernels` loads: `make kernels-hub`.

    build/kernels-hub/README.md
    build/kernels-hub/build/torch-universal/metadata.json
    build/kernels-hub/build/torch-universal/__init__.py, ...  the package itself
    build/kernels-hub/build/torch-universal/fused_ignore_ce/__init__.py, for `kernels` before 0.12

"Universal" means for every device: Triton compiles the kernels where they run, and PyTorch does the rest. The loader
imports the package under the id of `metadata.json`, so the package has to import its own modules relatively.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .project import ROOT, metadata

PACKAGE = ROOT / "fused_ignore_ce"
#: The version that users ask `get_kernel` for. It is raised when a public name goes or changes its meaning.
INTERFACE = 1
#: Files whose names begin like this are left out, because `python -m` cannot run a package that `kernels` loaded.
COMMANDS = ("__main__", "tools/")

README = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# fused_ignore_ce

{description}

```python
from kernels import get_kernel

losses = get_kernel("OWNER/fused-ignore-ce", version={interface}, trust_remote_code=["OWNER/fused-ignore-ce"])
loss = losses.fused_cross_entropy(logits, labels, ignore_index=-100)
```

`OWNER` is the owner of this repository. Patched models need transformers:

```python
import importlib

hf = importlib.import_module(losses.__name__ + ".hf")
hf.patch_model(model)
```
"""

COMPATIBLE = '''\
"""The package, for releases of `kernels` that look for it in a folder of its name."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parent.parent / "__init__.py")
_package = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_package)
__all__ = _package.__all__
globals().update({{name: getattr(_package, name) for name in __all__}})
'''


def sources() -> Iterator[tuple[str, bytes]]:
    """(name inside the package, content) of every file to write, including those of the kernels."""
    for path in sorted([*PACKAGE.rglob("*"), *(PACKAGE / "kernels").iterdir()]):
        name = path.relative_to(PACKAGE).as_posix()
        if path.suffix in (".py", ".json") and not name.startswith(COMMANDS):
            yield name, path.read_bytes()


def write(out: Path) -> Path:
    """Writes the repository, replacing one that is there, and returns the folder of its only variant."""
    files = dict(sources())
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + content for name, content in files.items())).hexdigest()
    project = metadata()
    entry = {
        "name": "fused-ignore-ce",
        "id": f"_fused_ignore_ce_universal_{digest[:7]}",
        "version": INTERFACE,
        "license": project["license"],
        "python-depends": [],
        "backend": {"type": "cuda"},  # the field is required and knows no "universal"; the folder's name decides
    }
    files["metadata.json"] = (json.dumps(entry, indent=2) + "\n").encode()
    files["fused_ignore_ce/__init__.py"] = COMPATIBLE.format(id=entry["id"]).encode()
    variant = out / "build" / "torch-universal"
    if out.exists():
        if not variant.exists() and any(out.iterdir()):
            raise FileExistsError(f"--out: expected a kernel repository or a folder that is empty, got {out}")
        shutil.rmtree(out)
    for name, content in files.items():
        path = variant / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    card = README.format(description=project["description"], interface=INTERFACE)
    (out / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", out)
    return variant


def main() -> None:
    """Writes build/kernels-hub, or the folder that `--out` names."""
    parser = argparse.ArgumentParser(prog="python -m scripts.kernels_hub", description="Writes a kernel repository.")
    default = ROOT / "build" / "kernels-hub"
    parser.add_argument("--out", type=Path, metavar="DIR", default=default, help="the repository's folder, replaced")
    out = parser.parse_args().out
    write(out)
    print(f"{out}: load it with kernels.get_local_kernel, or upload it as a repository of kernels")


if __name__ == "__main__":
    main()
