#!/usr/bin/env bash
# torch.manual_seed and torch.Generator.manual_seed on the CPU, with seeds beyond 32 bits.
#
# One would guess: seeds of up to 64 bits are accepted, so different ones give different numbers.
# What happens: the CPU's generator is made of the low 32 bits alone. Seeds that differ only above them give
# the very same numbers, while initial_seed() says that they are different.
# Whom it hurts: whoever makes seeds of parts, such as seed * 2**32 + stage or run << 40 | epoch: every seed
# has the same data order, labels drawn for Monte-Carlo curvature and initial weights, and the spread over
# "seeds" is zero or too small. Mix all parts into the low bits.
# Source: https://docs.pytorch.org/docs/stable/generated/torch.manual_seed.html (the range accepted),
# https://github.com/pytorch/pytorch/issues/87509 (the generator takes 32 bits)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
venv=${FINDINGS_VENV:-$folder/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(4, generator=generator), torch.randperm(8, generator=generator)
    return generator.initial_seed(), numbers


seeds = [7, 7 + 2**32, 7 + 5 * 2**40]
found = [draws(seed) for seed in seeds]
print("expected: three seeds, three streams")
for (initial, (numbers, order)) in found:
    print(f"seen: initial_seed {initial}: {numbers.tolist()}, {order.tolist()}")
assert [initial for initial, _ in found] == seeds
first = found[0][1]
assert all(torch.equal(a, b) for _, numbers in found for a, b in zip(numbers, first))
assert not torch.equal(draws(8)[1][0], first[0])
PYTHON
