"""The texts of a C library's files, but for its data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lossprune.deployment.sparse.plan import SOURCE, Extent
from lossprune.kernels.interface import texts

EXPECTED = "expected.txt"  # what the example prints


@dataclass(frozen=True)
class Signature:
    """What the functions of a library are called, and what they take.

    Attributes:
        name: that all of its names begin with.
        batch: the number of images, or rows, that it was laid out for.
        lanes: numbers of a vector.
        inputs: shapes of one image of each input, by the argument's name.
        outputs: the same of each output.
    """

    name: str
    batch: int
    lanes: int
    inputs: Mapping[str, Sequence[int]]
    outputs: Mapping[str, Sequence[int]]

    @property
    def upper(self) -> str:
        """The name, as macros begin."""
        return self.name.upper()

    @property
    def arguments(self) -> str:
        """The arguments of the function that runs it, as C declares them."""
        read = [f"const float *{name}" for name in self.inputs]
        written = [f"float *{name}" for name in self.outputs]
        return ", ".join(["void *context", "int64_t images", *read, *written])


@dataclass(frozen=True)
class PlanText:
    """A plan, as the library's file has it.

    Attributes:
        operations: what is in the array of them.
        vectors: of an element, as the kernels take it.
        room: numbers of the maps of a block, or a piece of it.
        extent: how much is computed at once.
        few: fewer images are computed by it, of a plan for those that are too few for a block.
    """

    operations: str
    vectors: int
    room: int
    extent: Extent
    few: int = 0


KERNELS = SOURCE.with_suffix(".h").name  # no file of its own to a build of all *.c


def kernel_files() -> dict[str, bytes]:
    """Return the kernels' source with all that it includes of ours, by file name."""
    return {
        KERNELS if file == SOURCE else file.name: text.encode()
        for file, text in texts(SOURCE).items()
    }


def header(signature: Signature, title: str) -> str:
    """Return what a caller includes."""
    name, upper = signature.name, signature.upper
    sizes = "\n".join(
        f"#define {upper}_{argument.upper()} {math.prod(shape)}"
        f" /* numbers of one: {' x '.join(map(str, shape))} */"
        for argument, shape in {**signature.inputs, **signature.outputs}.items()
    )
    return f"""/* {title}
 *
 * No function allocates memory or keeps any of its own: several threads may run at once, each with
 * a context of its own. */
#ifndef {upper}_H
#define {upper}_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_BATCH {signature.batch} /* what it was laid out for; it takes any number */
{sizes}

/* The bytes of a context. */
size_t {name}_context_bytes(void);

/* Prepare so many bytes as a context, once; 64 of them should begin at a multiple of 64. */
void {name}_start(void *context);

/* Compute the outputs of so many images: dense, one image after the other. */
void {name}_run({signature.arguments});

#ifdef __cplusplus
}}
#endif

#endif
"""


def example(signature: Signature) -> str:
    """Return a program that runs the network once and prints the first outputs."""
    name, upper = signature.name, signature.upper
    inputs, outputs = list(signature.inputs), list(signature.outputs)
    arrays = ", ".join(f"{a}[{upper}_BATCH * {upper}_{a.upper()}]" for a in (*inputs, *outputs))
    fill = "\n".join(
        f"    for (long k = 0; k < {upper}_BATCH * {upper}_{a.upper()}; k++)"
        f" {a}[k] = (float)(k % 1009) / 1009 - 0.5f;"
        for a in inputs
    )
    show = "\n".join(
        f'    for (long k = 0; k < {upper}_{a.upper()}; k++) printf("%.4g\\n", {a}[k]);'
        for a in outputs
    )
    return f"""/* Prints what {EXPECTED} holds: the outputs of the first image of a batch. */
#include <stdio.h>
#include <stdlib.h>
#include "{name}.h"

static float {arrays};

int main(void) {{
    void *context = malloc({name}_context_bytes());
    if (!context) return 1;
    {name}_start(context);
{fill}
    {name}_run(context, {upper}_BATCH, {", ".join((*inputs, *outputs))});
{show}
    free(context);
    return 0;
}}
"""


def cmake(signature: Signature) -> str:
    """Return how CMake builds the library and its example."""
    name, upper = signature.name, signature.upper
    return f"""cmake_minimum_required(VERSION 3.13)
project({name} C)
include(CheckCCompilerFlag)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
if(CMAKE_CROSSCOMPILING)
  set(native OFF)
else()
  set(native ON)
endif()
option({upper}_NATIVE "use all instructions of the machine that builds it" ${{native}})

add_library({name} {name}.c)
set_property(TARGET {name} PROPERTY C_STANDARD 11)
target_include_directories({name} PUBLIC ${{CMAKE_CURRENT_SOURCE_DIR}})
if({upper}_NATIVE)
  foreach(flag -march=native -mprefer-vector-width=512)
    string(MAKE_C_IDENTIFIER "takes${{flag}}" takes)
    check_c_compiler_flag(${{flag}} ${{takes}})
    if(${{takes}})
      target_compile_options({name} PRIVATE ${{flag}})
    endif()
  endforeach()
endif()

add_executable(example example.c)
target_link_libraries(example {name})
"""


def source(
    signature: Signature, constants: Mapping[str, int], plan: PlanText, rest: PlanText | None
) -> str:
    """Return the library's own file.

    Args:
        signature: of its functions.
        constants: the macros that the kernels are built with.
        plan: how images are computed.
        rest: how those are that are too few for a block, where there are blocks.
    """
    name = signature.name
    defines = "\n".join(f"#define {macro} {value}" for macro, value in constants.items())
    plans = {"operations": plan, **({"rest_operations": rest} if rest else {})}
    arrays = "\n".join(
        f"static const Operation {one}[] = {text.operations};" for one, text in plans.items()
    )
    return f"""/* The plan of a network, over the kernels of {KERNELS}. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* all functions of vectors are inline */
#endif
#define LOSSPRUNE_ALONE
#define LANES {signature.lanes}
{defines}

#include "{KERNELS}"
#include "{name}.h"
#include "{name}_weights.h"

{arrays}
#define COUNT(operations) (int64_t)(sizeof operations / sizeof *operations)
#define NUMBERS {max(text.extent.numbers for text in plans.values())}

size_t {name}_context_bytes(void) {{ return sizeof(float) * NUMBERS; }}

void {name}_start(void *context) {{ memset(context, 0, {name}_context_bytes()); }}

void {name}_run({signature.arguments}) {{
{_runs(signature, plan, rest)}
}}
"""


def _runs(signature: Signature, plan: PlanText, rest: PlanText | None) -> str:
    """Return the calls of the kernels."""
    upper, shapes = signature.upper, {**signature.inputs, **signature.outputs}
    tensors = [*(f"(float *){one}" for one in signature.inputs), *signature.outputs]
    first = f"    float *const tensors[] = {{{', '.join(tensors)}}};"
    if rest is None:
        return f"""{first}
    {_call("operations", "tensors", "images", plan)}"""
    moved = ", ".join(
        f"{tensor} + whole * {upper}_{argument.upper()}"
        for tensor, argument in zip(tensors, shapes, strict=True)
    )
    return f"""    /* What fills no block is computed image by image, as far as that takes less. */
    const int64_t few = images % LANES < {rest.few} ? images % LANES : 0, whole = images - few;
{first}
    float *const others[] = {{{moved}}};
    if (whole) {_call("operations", "tensors", "whole", plan)}
    if (few) {_call("rest_operations", "others", "few", rest)}"""


def _call(operations: str, tensors: str, images: str, plan: PlanText) -> str:
    sizes = (plan.extent.tokens, plan.extent.together, plan.vectors, "context", plan.room)
    first = f"run({operations}, COUNT({operations}), {tensors}, {images}"
    return f"{first}, {', '.join(map(str, sizes))}, {plan.extent.scratch}, 1, NULL);"
