"""C libraries of pruned networks: they build, need nothing, and give what the network gives."""

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lossprune
from lossprune import PruningError
from lossprune.deployment.whole import all_sparse

GCC = shlex.split(os.environ.get("CC") or "gcc")
CLANG = ["clang"] if shutil.which("clang") else [sys.executable, "-m", "ziglang", "cc"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(shutil.which(GCC[0]) is None, reason="no gcc here")

DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include "net.h"

int main(int count, char **arguments) {
    size_t images = (size_t)atol(arguments[count - 1]);
    float *input = malloc(images * NET_INPUT * sizeof(float));
    float *output = malloc(images * NET_OUTPUT * sizeof(float));
    void *context = malloc(net_context_bytes());
    if (fread(input, sizeof(float) * NET_INPUT, images, stdin) != images) return 1;
    net_start(context);
    for (int twice = 0; twice < 2; twice++) net_run(context, (int64_t)images, input, output);
    fwrite(output, sizeof(float) * NET_OUTPUT, images, stdout);
    free(input), free(output), free(context);
    return 0;
}
"""


class Residual(nn.Module):
    """Strides, sums, products, scales, windows, and maps that are joined."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.skip = nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.Conv2d(8, 8, 1, 2)
        self.pool, self.head = nn.MaxPool2d(3, 1), nn.Linear(16, 5)
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.LayerNorm(8)

    def forward(self, x):
        x = torch.tanh(self.norm(torch.relu(self.stem(x))))
        x = self.pool(torch.relu(self.down(x) + self.skip(x)))
        x = self.last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = torch.cat([F.leaky_relu(x - 1), F.avg_pool2d(x, 3, 1, 1).clamp(max=0.5)], 1)
        return self.head(x.mean((2, 3)))


def pruned(model):
    torch.manual_seed(1)
    weights = lossprune.Mask.dense(model.eval())
    return model, lossprune.Mask({name: torch.rand(w.shape) < 0.4 for name, w in weights.items()})


def images(count):
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The networks' modules and folders, by how many images they are laid out for."""
    folder = tmp_path_factory.mktemp("c")
    network = pruned(Residual())
    for count, lanes in ((2, 4), (40, None)):
        out = folder / str(count) / "net"
        lossprune.write_c(*network, images(count), out, lanes=lanes, seconds=0.02)
    return all_sparse(*network, images(2))[0], folder


def built(folder, compiler, *flags, driver="driver.c", out="driver"):
    (folder / "driver.c").write_text(DRIVER)
    command = [*compiler, "-std=gnu11", "-Wall", *flags, "net.c", driver, "-o", out]
    done = subprocess.run(
        [word for word in command if word], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    return folder / out


def outputs(program, given):
    done = subprocess.run(
        [*program, str(len(given))], input=given.numpy().tobytes(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return torch.from_numpy(np.frombuffer(done.stdout, np.float32).reshape(len(given), -1).copy())


def check_outputs(program, network, counts):
    for count in counts:
        expected = network(images(count))
        assert torch.allclose(outputs(program, images(count)), expected, rtol=0, atol=1e-5)


def test_blocks_of_images_and_the_rest_stay_in_their_memory(libraries):
    network, folder = libraries
    program = built(folder / "40" / "net", GCC, "-O0", "-march=native", "-g", *SANITIZED)
    check_outputs([program], network, (40, 1, 33))  # 33: two whole blocks, or more, and one


def test_threads_have_contexts_of_their_own(libraries):
    network, folder = libraries
    folder = folder / "2" / "net"
    library = ctypes.CDLL(
        str(built(folder, GCC, "-O0", "-shared", "-fPIC", driver="", out="net.so"))
    )
    library.net_context_bytes.restype = ctypes.c_size_t
    given, made = images(9), {}

    def run(thread):
        context = (ctypes.c_char * library.net_context_bytes())()
        library.net_start(context)
        for _ in range(20):
            own, output = given + thread, torch.empty(9, 5)
            pointers = (ctypes.c_void_p(one.data_ptr()) for one in (own, output))
            library.net_run(context, ctypes.c_int64(9), *pointers)
            made.setdefault(thread, []).append(output)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in range(4):
        expected = network(given + thread)
        for output in made[thread]:
            assert torch.allclose(output, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(
    CLANG[0] != "clang" and importlib.util.find_spec("ziglang") is None, reason="no clang here"
)
@pytest.mark.full("clang, beside gcc")
def test_clang_builds_it(libraries):
    network, folder = libraries
    check_outputs([built(folder / "2" / "net", CLANG, "-O1")], network, (2, 5))


@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang here")
@pytest.mark.parametrize(
    "machine", ["aarch64", pytest.param("arm", marks=pytest.mark.full("32 bits, beside 64"))]
)
def test_it_compiles_for_arm_and_runs_where_that_can_be(libraries, machine):
    network, folder = libraries
    target = "arm-linux-musleabihf" if machine == "arm" else f"{machine}-linux-musl"
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", target]
    emulator = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if emulator is None:  # a whole program would have the C library built for it, half a minute
        built(folder / "2" / "net", zig, "-O1", "-c", driver="", out="net.o")
        return
    program = built(folder / "2" / "net", zig, "-O1", "-static", out=machine)
    check_outputs([emulator, program], network, (2, 5))


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake here")
def test_cmake_builds_it_and_the_example_prints_what_is_expected(libraries, tmp_path):
    folder = libraries[1] / "40" / "net"
    for step in (["-S", folder, "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Debug"], ["--build", tmp_path]):
        subprocess.run(["cmake", *step], capture_output=True, check=True)
    done = subprocess.run([tmp_path / "example"], capture_output=True, text=True, check=True)
    found, expected = done.stdout.split(), (folder / "expected.txt").read_text().split()
    assert [float(number) for number in found] == pytest.approx(
        [float(number) for number in expected], rel=1e-3, abs=1e-6
    )


class Tokens(nn.Module):
    """Patches, places, norms, attention, a perceptron, and the mean over tokens."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 51, 12))
        self.layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, activation="gelu")
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        return self.head(self.layer(x + self.places).mean(1))


@pytest.mark.parametrize(
    ("lanes", "flags"),
    [
        (4, []),
        (8, SANITIZED),
        pytest.param(16, SANITIZED, marks=pytest.mark.full("16 lanes, beside 4 and 8")),
    ],
)
def test_a_transformer_for_vectors_of_each_width(lanes, flags, tmp_path):
    torch.manual_seed(0)
    network, examples = pruned(Tokens()), torch.randn(7, 3, 20, 41)
    lossprune.write_c(*network, examples, tmp_path / "net", lanes=lanes, seconds=0.02)
    expected = all_sparse(*network, examples)[0]
    program = built(tmp_path / "net", GCC, "-O0", "-march=native", *flags)
    for count in (7, 1):
        found, given = outputs([program], examples[:count]), expected(examples[:count])
        assert torch.allclose(found, given, rtol=0, atol=1e-5)


class Attention(nn.Module):
    """Not sparse to its end."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.softmax(self.first(x), 1))


class Branching(Attention):
    """Has no graph."""

    def forward(self, x):
        return self.first(x) if x.sum() > 0 else 0 * self.first(x)


def scaled():
    return nn.Sequential(nn.Linear(6, 4), nn.Softmax(1))


REFUSED = {
    "an operation": (Attention, "a C library holds the sparse kernels' operations alone, and 'so"),
    "a branch": (Branching, "a C library needs the network's graph: "),
    "a layer": (scaled, "and '1' (Softmax) is none of them: lossprune.export_onnx writes"),
}


@pytest.mark.parametrize(("model", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_the_kernels_is_refused_by_name(model, said, tmp_path):
    with pytest.raises(PruningError) as told:
        lossprune.write_c(*pruned(model()), torch.randn(2, 6), tmp_path / "net")
    assert said in str(told.value)
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_something_else_are_left_alone(libraries, tmp_path):
    network = pruned(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)))

    def write(folder, **more):
        lossprune.write_c(*network, torch.randn(2, 6), folder, seconds=0.01, **more)

    write(tmp_path / "net")
    with pytest.raises(ValueError, match="net holds a C library: overwrite it, or give another"):
        write(tmp_path / "net")
    write(tmp_path / "net", overwrite=True)
    with pytest.raises(ValueError, match="holds other files: give a new or empty folder"):
        write(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="'string' cannot be one in C; give a folder such as"):
        write(tmp_path / "string")
    with pytest.raises(ValueError, match="lanes must be one of 4, 8, 16, got 5"):
        write(tmp_path / "other", lanes=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a folder"):
        write(tmp_path / "file")
