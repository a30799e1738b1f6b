"""Floating-point operations of a program, counted where it is written down: in its jaxpr.

Only matrix products and convolutions count, two operations per multiplication and addition, as papers count them. XLA's
own cost analysis depends on the backend and counts the body of a loop once, however often it runs; layers here are
scanned.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval


def count(jaxpr: Any) -> float:
    """Operations of a jaxpr (`jax.make_jaxpr`, or ``jax.jit(f).trace(...).jaxpr``), of all devices together.

    What no result depends on is not counted, as the compiler drops it: most of the backward passes behind an adaptive
    weight. Loops of unknown length count once; of branches, the dearest one.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _all(needed)


def _all(jaxpr: Any) -> float:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "scan":
        return params["length"] * _all(params["jaxpr"])
    if name == "cond":
        return max(_all(branch) for branch in params["branches"])
    return sum(_all(inner) for inner in _inner(params))


def _inner(params: Any) -> list[Any]:
    found = []
    for value in params.values():
        entries = value if isinstance(value, (list, tuple)) else (value,)
        found += [entry for entry in entries if isinstance(entry, (core.Jaxpr, core.ClosedJaxpr))]
    return found


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """Of gradients as well: what counts is where input and kernel meet, not the zeros between them."""
    params, kernel = equation.params, equation.invars[1].aval.shape
    numbers = params["dimension_numbers"]
    outputs = equation.outvars[0].aval.shape
    per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    dilated = math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(outputs) * per_output / dilated
