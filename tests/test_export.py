"""A program that `torchdeq.export` makes does what the model does in Python, and says what it cannot do."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import torchdeq
from torchdeq import DEQ, Anderson, Broyden, FixedPointIteration, Multisecant, export
from torchdeq.solver.graph_map import GraphMap

SOLVERS = [
    FixedPointIteration(tol=1e-10, max_iter=80),
    Anderson(tol=1e-10, max_iter=40),
    Broyden(tol=1e-10, max_iter=40),
    Multisecant(tol=1e-10, max_iter=40),
]


class Cell(nn.Module):
    """tanh(W z + x), a contraction."""

    def __init__(self, width: int = 5):
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.orthogonal_(self.linear.weight, 0.7)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Model(nn.Module):
    """What users write: encode, solve, decode; with normalised weights, batch norm and dropout."""

    def __init__(self, width: int = 6, **options: Any):
        super().__init__()
        self.encoder = nn.Linear(3, width)
        self.weight = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.5)
        self.decoder = nn.Linear(width, 2)
        torchdeq.apply_norm(self.weight)
        self.deq = DEQ(Anderson(tol=1e-9), **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = self.encoder(x)
        z, info = self.deq(
            lambda z: torch.tanh(0.7 * self.norm(self.dropout(self.weight(z))) + u), torch.zeros_like(u)
        )
        return self.decoder(z), info.nstep, info.converged


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    model = Model(throw=True).double()
    model.norm.running_var.fill_(1.7)
    model.norm.running_mean.uniform_(-0.1, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def program(model: Model) -> ExportedProgram:
    return export(model, torch.ones(4, 3, dtype=torch.float64))


@functools.cache
def cell_and_program(index: int) -> tuple[Cell, DEQ, ExportedProgram]:
    """A cell, a DEQ with the solver of this number, and their program, made once."""
    cell, deq = Cell().double().eval(), DEQ(SOLVERS[index]).eval()
    return cell, deq, export(deq, cell, (torch.zeros(2, 5), torch.randn(2, 5)))


def uneven(batch: int, width: int) -> Tensor:
    """Inputs at which samples stop at different times."""
    return torch.randn(batch, width) * torch.logspace(-2, 1, batch)[:, None]


def solved(deq: DEQ, f: Callable[..., Any], z0: Any, *inputs: Any) -> tuple[Any, torchdeq.Solution]:
    with torch.no_grad():
        out: tuple[Any, torchdeq.Solution] = deq(lambda z: f(z, *inputs), z0)
    return out


@pytest.mark.parametrize("index", range(len(SOLVERS)), ids=lambda index: type(SOLVERS[index]).__name__)
def test_program_takes_the_steps_of_the_model_at_another_batch_size(index: int) -> None:
    cell, deq, program = cell_and_program(index)
    run = program.module()
    for batch in (6, 1):
        z0, x = torch.zeros(batch, 5), uneven(batch, 5)
        z, info = run(z0, x)
        expected, solution = solved(deq, cell, z0, x)
        # K⁻¹ that is bordered and K that is factored round differently, and Multisecant's K is nearly singular here.
        level = 1e-10 if isinstance(SOLVERS[index], Multisecant) else 1e-13
        torch.testing.assert_close(z, expected, rtol=level, atol=level)
        assert torch.equal(info["nstep"], solution.nstep)
        assert info["converged"].all()
        torch.testing.assert_close(
            info["residual"], solution.residual, rtol=1e-3, atol=1e-11 if level > 1e-13 else 1e-15
        )
        if batch > 1:
            assert len(set(info["nstep"].tolist())) > 1
        # Against the equation itself, not the library's own word.
        torch.testing.assert_close(cell(z, x), z, rtol=1e-8, atol=1e-9)


@functools.cache
def short() -> tuple[Cell, DEQ, ExportedProgram]:
    """A solve of a fixed size with a solver for inference that stops before all samples have converged."""
    cell = Cell().double().eval()
    deq = DEQ(
        torchdeq.NewtonKrylov(tol=1e-6), eval_solver=FixedPointIteration(tol=1e-3, max_iter=12), record=(3,)
    ).eval()
    with pytest.warns(torchdeq.ConvergenceWarning):
        program = export(deq, cell, (torch.zeros(4, 5), uneven(4, 5)), dynamic_batch=False)
    return cell, deq, program


def test_program_of_the_eval_solver_stops_at_max_iter_and_says_so() -> None:
    cell, deq, program = short()
    x = uneven(4, 5)
    z, info = program.module()(torch.zeros(4, 5), x)
    expected, solution = solved(deq, cell, torch.zeros(4, 5), x)
    assert torch.equal(info["converged"], solution.converged)
    assert info["converged"].tolist().count(False) in (1, 2, 3)
    assert torch.equal(info["nstep"], solution.nstep)
    torch.testing.assert_close(z, expected)


def test_whole_model_with_normalised_weights_batch_norm_and_dropout(
    model: Model, program: ExportedProgram
) -> None:
    x = uneven(7, 3)
    with torch.no_grad():
        expected, nstep, converged = model(x)
    y, steps, done = program.module()(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(steps, nstep)
    assert done.all()
    assert converged.all()
    assert set(program.state_dict) == set(model.state_dict())


def test_saved_and_loaded_program_is_the_same(program: ExportedProgram) -> None:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file)
    x = uneven(3, 3)
    for one, other in zip(program.module()(x), again.module()(x), strict=True):
        assert torch.equal(one, other)


def test_program_cannot_train_and_the_model_still_can(model: Model, program: ExportedProgram) -> None:
    x = torch.randn(3, 3, requires_grad=True)
    y, *_ = program.module()(x)
    assert not y.requires_grad
    assert not any(parameter.requires_grad for parameter in program.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_program_of_a_model_that_throws_raises_too(program: ExportedProgram) -> None:
    with pytest.raises(RuntimeError, match="did not converge"):
        program.module()(torch.full((2, 3), float("nan")))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's own
def test_ahead_of_time_compiled_program_does_what_the_model_does(tmp_path: Any) -> None:
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"AOTInductor needs a C++ compiler: {error}")
    cell, deq, program = cell_and_program(1)
    # Without optimising the code around the kernels, which takes the C++ compiler long.
    options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = aoti_compile_and_package(
        program, package_path=str(tmp_path / "cell.pt2"), inductor_configs=options
    )
    run = aoti_load_package(path)
    z0, x = torch.zeros(6, 5), uneven(6, 5)
    z, info = run(z0, x)
    expected, solution = solved(deq, cell, z0, x)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(info["nstep"], solution.nstep)


def test_nested_state_with_a_complex_leaf() -> None:
    def f(z: dict[str, Any], x: Tensor) -> dict[str, Any]:
        a, (b, c) = z["a"], z["b"]
        return {
            "a": torch.cos(0.3 * a + x),
            "b": (0.5 * b + a.sum(-1), c * 0.4 * torch.exp(1j * a[:, :2]) + 1),
        }

    def start(batch: int) -> dict[str, Any]:
        return {"a": torch.zeros(batch, 3), "b": (torch.zeros(batch), torch.zeros(batch, 2) + 0j)}

    deq = DEQ(FixedPointIteration(tol=1e-10, max_iter=80)).eval()
    run = export(deq, f, (start(2), torch.randn(2, 3))).module()
    x = torch.randn(4, 3)
    z, info = run(start(4), x)
    expected, solution = solved(deq, f, start(4), x)
    assert torch.equal(info["nstep"], solution.nstep)
    assert z["b"][1].is_complex()
    for one, other in ((z["a"], expected["a"]), *zip(z["b"], expected["b"], strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_state_that_is_one_system() -> None:
    matrix = 0.6 * torch.linalg.qr(torch.randn(6, 6))[0]

    def f(z: Tensor, b: Tensor) -> Tensor:
        return matrix @ z + b

    b = torch.randn(6)
    program = export(
        DEQ(FixedPointIteration(tol=1e-11, max_iter=80), batch_dims=0).eval(), f, (torch.zeros(6), b)
    )
    z, info = program.module()(torch.zeros(6), b)
    torch.testing.assert_close(z, torch.linalg.solve(torch.eye(6) - matrix, b), rtol=1e-8, atol=1e-8)
    assert info["converged"].all()


def test_torch_export_alone_will_do_and_recorded_states_are_those_of_the_model() -> None:
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()
            self.deq = DEQ(FixedPointIteration(tol=1e-10, max_iter=80), record=(3, 70))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            z, info = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))
            early, late = info.states
            return z, early, late

    model = Recording().eval()
    x = uneven(4, 5)
    with torch.no_grad():
        expected = model(x)
        got = torch.export.export(model, (x,), strict=False).module()(x)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_size_may_be_fixed() -> None:
    _, _, program = short()
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.zeros(2, 5), torch.ones(2, 5))


def test_training_mode_is_refused() -> None:
    example = (torch.zeros(2, 5), torch.ones(2, 5))
    with pytest.raises(RuntimeError, match=r"training mode.*\.eval\(\)"):
        export(DEQ(Anderson()).eval(), Cell(), example)
    with pytest.raises(RuntimeError, match=r"training mode.*\.eval\(\)"):
        export(DEQ(Anderson()), Cell().eval(), example)
    with pytest.raises(RuntimeError, match="training mode"):
        export(Model().eval().train(), torch.ones(2, 3))
    cell = Cell()
    with pytest.raises(RuntimeError, match="training mode"):  # the modules that a function holds, too
        export(DEQ(Anderson()).eval(), lambda z, x: cell(z, x), example)


def test_a_solver_without_a_fixed_shape_is_refused_with_the_names_of_those_that_can() -> None:
    deq = DEQ(torchdeq.NewtonKrylov(tol=1e-6)).eval()
    with pytest.raises(TypeError, match=r"NewtonKrylov.*cannot be exported") as raised:
        export(deq, Cell().eval(), (torch.zeros(2, 5), torch.ones(2, 5)))
    for name in ("FixedPointIteration", "Anderson", "Broyden", "Multisecant"):
        assert name in str(raised.value)


def test_examples_that_are_none_are_refused() -> None:
    deq, cell = DEQ(Anderson()).eval(), Cell().eval()
    with pytest.raises(ValueError, match="two or more"):
        export(deq, cell, (torch.zeros(1, 5), torch.ones(1, 5)))
    with pytest.raises(ValueError, match="no tensor"):
        export(deq, cell, ())
    wrong: Any = export
    with pytest.raises(TypeError, match=r"export\(deq, f, \(z0, x\)\)"):
        wrong(deq, (torch.zeros(2, 5),))


def test_a_solution_that_is_returned_is_refused() -> None:
    class Returns(Model):
        def forward(self, x: Tensor) -> Any:
            return self.deq(lambda z: torch.tanh(0.1 * z + x), torch.zeros_like(x))

    with pytest.raises(TypeError, match=r"info\.residual"):
        export(Returns().eval(), torch.ones(2, 3))


def test_f_that_chooses_by_values_is_explained() -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z + x if z.sum() > 0 else 0.25 * z + x

    with pytest.raises(RuntimeError) as raised:  # torch's, of the call before the loop
        export(DEQ(Anderson()).eval(), f, (torch.zeros(2, 5), torch.ones(2, 5)))
    assert any("by the values of tensors" in note for note in raised.value.__notes__)


class Differs(nn.Module):
    """Gives x and a small difference; in a program, both changed by so much of x."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        by = self.by * x if torch.compiler.is_compiling() else torch.zeros_like(x)
        return x + by, 1e-4 * x.sin() + by


def test_a_program_that_gives_something_else_is_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="something else than the model"):
        export(Differs(1e-6).eval(), x)
    assert export(Differs(1e-6).eval(), x, check=False) is not None


def test_a_difference_may_have_the_rounding_of_what_it_is_a_difference_of() -> None:
    x = torch.ones(2, 3, dtype=torch.float32)
    export(Differs(4 * torch.finfo(torch.float32).eps).eval(), x)
    with pytest.raises(RuntimeError, match="something else than the model"):
        export(Differs(100 * torch.finfo(torch.float32).eps).eval(), x)


def test_graph_map_refuses_containers_that_a_graph_does_not_know() -> None:
    from collections import deque

    from torchdeq._state import layout_of

    with pytest.raises(TypeError, match="deque in it cannot be exported"):
        GraphMap(lambda z: z, layout_of(deque([torch.ones(2, 3)])))


def test_an_example_that_does_not_fit_f_says_how_it_is_called() -> None:
    deq = DEQ().eval()
    with pytest.raises(TypeError) as caught:
        export(deq, lambda z, x: (z / 2 + x).cos(), (torch.zeros(2, 4),))
    assert "give (z0, x)" in "".join(caught.value.__notes__)


class Few(nn.Module):
    """Three evaluations."""

    def __init__(self, method: torchdeq.GradMethod) -> None:
        super().__init__()
        self.cell = Cell().double()
        self.deq = DEQ(FixedPointIteration(max_iter=3, min_iter=3, tol=torch.inf), method)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))[0]
        return z


def test_the_value_of_unrolled_steps_is_exported() -> None:
    model, x = Few(torchdeq.Unroll()).eval(), torch.randn(4, 5, dtype=torch.float64)
    program = export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x).detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [torchdeq.Unroll(last=2), torchdeq.TruncatedCycle()], ids=repr)
def test_other_steps_of_a_methods_own_are_refused(method: torchdeq.GradMethod) -> None:
    model, x = Few(method).eval(), torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match="makes steps of its own, which are not exported"):
        export(model, (x,))
    model.deq.eval_solver = Anderson(tol=1e-9)
    export(model, (x,))
