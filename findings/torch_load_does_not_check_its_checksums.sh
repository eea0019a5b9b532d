#!/usr/bin/env bash
# torch.load of a checkpoint in which one bit has changed.
#
# One would guess: the file is a zip archive with a CRC-32 of every tensor, so a damaged one raises.
# What happens: torch.save writes the checksums, torch.load was built not to look at them. The weights are
# others, without a word; Python's own zipfile names the damaged entry.
# Whom it hurts: everyone who resumes or evaluates from a file that a disk, a copy or a sync has damaged.
# A pruned network has few weights left: one that becomes infinite, or a bit of a mask, is a wrong result
# that looks like a finding.
# Source: https://github.com/pytorch/pytorch/pull/28858, https://github.com/pytorch/pytorch/issues/126952
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import zipfile
from pathlib import Path

import torch

print("torch", torch.__version__)
file = Path("checkpoint.pt")
torch.save({"weight": torch.ones(1000)}, file)
contents = bytearray(file.read_bytes())
start = contents.index(b"\x00\x00\x80\x3f" * 1000)  # a thousand ones
contents[start + 4 * 500 + 3] ^= 0x40
file.write_bytes(contents)
weight = torch.load(file, weights_only=True)["weight"]
print("expected: an error that says that the file is damaged")
print("seen: loaded, with the values", weight.unique().tolist())
print("zipfile says that this entry is damaged:", zipfile.ZipFile(file).testzip())
assert not torch.equal(weight, torch.ones(1000))
assert zipfile.ZipFile(file).testzip() is not None
PYTHON
