#!/bin/sh
# Makes a bare GPU machine ready for `make gpu-check`, offline: sh benchmarks/gpu_setup.sh PYTHON
# Installs what is missing from the wheels in gpu-bundle/ into gpu-bundle/site/, and unpacks Transformer Engine there if its
# archive (te_all.tar.xz) lies beside them; one that does not run here is put aside again, and said so, because every run
# would be refused with it. Touches nothing else of the machine. Says in one line what is still missing.
# How to fill gpu-bundle/: docs/gpu-measured.md.
set -eu
python=${1:-python3}
cd "$(dirname "$0")/.."
bundle=$PWD/gpu-bundle
site=$bundle/site
"$python" -c 'import torch' 2>/dev/null || { echo "error: $python has no torch: name one that has with GPU_PYTHON=..." >&2; exit 2; }
mkdir -p "$bundle"
# What was found of Transformer Engine holds for one machine and Python: the folder travels.
here=$(printf '%s %s' "$(uname -n)" "$("$python" -c 'import sys, torch; print(sys.executable, getattr(torch, "__version__", ""))')" | cksum | cut -d ' ' -f 1)
if [ -f "$bundle/te_all.tar.xz" ] && [ ! -d "$site/transformer_engine" ] && [ ! -d "$bundle/unusable-$here" ]; then
    mkdir -p "$site"
    # Python's own reader: a bare machine may lack xz.
    "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$bundle/te_all.tar.xz" "$site"
fi
PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} "$python" - "$bundle" "$site" <<'END'
import importlib.util
import subprocess
import sys
from pathlib import Path

bundle, site = Path(sys.argv[1]), sys.argv[2]
# Distribution -> what it is imported as.
NEEDED = {
    "megatron-core": "megatron.core", "hydra-core": "hydra", "omegaconf": "omegaconf", "antlr4-python3-runtime": "antlr4",
    "PyYAML": "yaml", "psutil": "psutil", "packaging": "packaging", "numpy": "numpy", "rich": "rich",
    "markdown-it-py": "markdown_it", "mdurl": "mdurl", "pygments": "pygments",
    "safetensors": "safetensors",
}  # fmt: skip


def there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def plain(name):
    return name.lower().replace("-", "_").replace(".", "_")


wheels = {}
for wheel in sorted(bundle.glob("*.whl")):
    wheels[plain(wheel.name.split("-")[0])] = wheel
# What Transformer Engine and torchtitan need is theirs to say: all other wheels of the folder are put in once.
missing = [name for name, module in NEEDED.items() if not there(module)]
wanted = [wheels[plain(name)] for name in missing if plain(name) in wheels]
known = {plain(name) for name in NEEDED}
extra = [wheel for name, wheel in wheels.items() if name not in known and not there(name)]
if wanted or extra:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps",
         "--upgrade", "--target", site, *map(str, [*wanted, *extra])], check=True,
    )  # fmt: skip
lost = [name for name in missing if plain(name) not in wheels]
if lost:
    print(f"error: missing for gpu-check: {', '.join(lost)}: put their wheels into {bundle} (docs/gpu-measured.md), or install them",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)
END
[ -d "$site/transformer_engine" ] && [ ! -f "$bundle/te-runs-$here" ] || exit 0
if PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} timeout 120 "$python" - >"$bundle/te.log" 2>&1 <<'END'
import torch
import transformer_engine.pytorch as te

if torch.cuda.is_available():
    options = {"params_dtype": torch.bfloat16, "device": "cuda"}
    rows = torch.randn(64, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    output = te.GroupedLinear(4, 128, 256, bias=False, **options)(te.Linear(128, 128, **options)(rows), [20, 0, 40, 4])
    heads = output.view(64, 1, 2, 128)
    attention = te.DotProductAttention(2, 128, attn_mask_type="causal", qkv_format="sbhd")
    attention(heads, heads, heads).sum().backward()
    assert bool(torch.isfinite(rows.grad).all())
END
then
    touch "$bundle/te-runs-$here"
else
    mkdir -p "$bundle/unusable-$here"
    mv "$site"/transformer_engine* "$bundle/unusable-$here/"
    echo "Transformer Engine of gpu-bundle does not run here ($(tail -n 1 "$bundle/te.log")): put aside in gpu-bundle/unusable-$here" >&2
fi
