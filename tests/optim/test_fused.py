"""The fused step: the eager one to rounding, however parameters, state and gradients change."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch

from hf_sophia import WeightDecay
from hf_sophia.kernels import cpu, no_kernel_because
from hf_sophia.optim import OPTIMIZERS, Adam, RAdam, Sophia
from hf_sophia.optim.kernel_plan import KernelCall, KernelPlan

CPU = torch.device("cpu")

needs_kernel = pytest.mark.skipif(
    bool(no_kernel_because(CPU, torch.float32)),
    reason=no_kernel_because(CPU, torch.float32) or "-",
)

SHAPES = ((70, 300), (300,), (), (5, 4, 3), (0, 2), (30, 30))

SOPHIA_OPTIONS = [
    {},
    {"nesterov": True},
    {"bias_correction": True},
    {"rho": "auto", "target_clip_fraction": 0.2, "nesterov": True, "bias_correction": True},
    {"rho": "auto", "rho_scope": "group", "target_clip_fraction": 0.2},
    {"weight_decay": WeightDecay(0.1)},
    {"weight_decay": WeightDecay(0.01, absolute=True)},
    {"weight_decay": WeightDecay(0.1, weight_decouple=False)},
    {"betas": (0.0, 0.5)},
]
ADAM_OPTIONS = [
    {},
    {"eps": 1e-3},
    {"eps": 1e-3, "optimized_update": False},
    {"weight_decay": WeightDecay(0.1)},
    {"weight_decay": WeightDecay(0.01, absolute=True)},
    {"weight_decay": WeightDecay(0.1, weight_decouple=False)},
]
RADAM_OPTIONS = [
    *ADAM_OPTIONS,
    {"amsgrad": True, "weight_decay": 0.1},
    {"degenerated_to_sgd": False, "weight_decay": 0.1},
]
CASES = [
    pytest.param(name, options, id=f"{name}-{index}")
    for name, table in (
        ("sophia", SOPHIA_OPTIONS),
        ("adam", ADAM_OPTIONS),
        ("radam", RADAM_OPTIONS),
    )
    for index, options in enumerate(table)
]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES
    ]


def estimate_of(param: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return an estimate that is also negative in places, as Hutchinson's."""
    return (torch.rand(param.shape, generator=generator, dtype=torch.float32) - 0.2) ** 3


def take_step(optimizer: torch.optim.Optimizer, step: int, only: slice = slice(None)) -> None:
    """Take a step with gradients and estimates of that number."""
    generator = torch.Generator().manual_seed(step)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        noise = torch.randn(param.shape, generator=generator)
        param.grad = noise.to(param.dtype)
    estimates = {p: estimate_of(p, generator) for p in params}
    for param in set(params) - set(params[only]):
        param.grad = None
    if isinstance(optimizer, Sophia) and optimizer.hessian_due:
        optimizer.update_hessian(estimates)
    optimizer.step()


def assert_alike(one: torch.optim.Optimizer, other: torch.optim.Optimizer, atol=5e-6) -> None:
    # A dozen steps round the parameters, of up to 4, twice each.
    pairs = zip(
        itertools.chain(*(group["params"] for group in one.param_groups)),
        itertools.chain(*(group["params"] for group in other.param_groups)),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=atol)
        assert one.state[a].keys() == other.state[b].keys()
        for key, value in one.state[a].items():
            torch.testing.assert_close(value, other.state[b][key], rtol=2e-5, atol=1e-6)


@pytest.fixture
def calls(monkeypatch) -> list[KernelCall]:
    """The kernel calls that steps were taken by."""
    seen = []
    update = KernelCall.update

    def watched(call, *args) -> bool:
        seen.append(call)
        return update(call, *args)

    monkeypatch.setattr(KernelCall, "update", watched)
    return seen


@pytest.fixture
def fused_adam_calls(monkeypatch) -> list[int]:
    """How many tensors each call of torch's kernel had."""
    seen = []
    for name in ("_fused_adam_", "_fused_adamw_"):

        def watched(params, *args, original=getattr(torch, name), **options) -> None:
            seen.append(len(params))
            original(params, *args, **options)

        monkeypatch.setattr(torch, name, watched)
    return seen


@needs_kernel
@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_is_the_eager_step(name, options, calls, fused_adam_calls) -> None:
    options = {"lr": 0.01, **({"rho": 0.2, "k": 3} if name == "sophia" else {}), **options}
    forms = [OPTIMIZERS[name](parameters(), **options, fused=form) for form in (None, False)]
    fractions = []
    for step in range(1, 13):
        for optimizer in forms:
            take_step(optimizer, step)
        if name == "sophia":
            fractions.append([float(optimizer.clip_fraction()) for optimizer in forms])
    assert_alike(*forms)
    for fused, eager in fractions:
        assert fused == pytest.approx(eager, abs=2 / 22_000)
    decay = options.get("weight_decay", 0.0)
    coupled = isinstance(decay, WeightDecay) and not decay.weight_decouple
    if name == "sophia":
        assert len(calls) == (0 if coupled else 12)
    else:
        # RAdam's first steps are not adaptive, and not torch's.
        assert fused_adam_calls == [len(SHAPES)] * (7 if name == "radam" else 12)


@needs_kernel
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_of_zero_only_decays(name) -> None:
    for decay, factor in ((WeightDecay(0.1), 1.0), (WeightDecay(0.1, absolute=True), 0.9)):
        params = parameters()
        before = [param.detach().clone() for param in params]
        optimizer = OPTIMIZERS[name](params, lr=0.0, weight_decay=decay)
        for step in range(1, 9):
            take_step(optimizer, step)
        for param, old in zip(params, before, strict=True):
            torch.testing.assert_close(param.detach(), old * factor**8)


def move(optimizer: Sophia) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.clone()


def replace_state(optimizer: Sophia) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone()
        state["hessian"] = state["hessian"].clone()


def move_state(optimizer: Sophia) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].data = state["exp_avg"].data.clone()
        state["hessian"].data = state["hessian"].data.clone()


def load(optimizer: Sophia) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_group(optimizer: Sophia) -> None:
    extra = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 33))
    optimizer.add_param_group({"params": [extra], "lr": 0.02})


def reverse(optimizer: Sophia) -> None:
    optimizer.param_groups[0]["params"].reverse()


def transpose(optimizer: Sophia) -> None:
    # The same memory at the same place, in another order.
    param = optimizer.param_groups[0]["params"][0]
    for state in optimizer.state.values():
        if state["exp_avg"].shape == param.shape:
            for name in ("exp_avg", "hessian"):
                state[name].data = state[name].data.t().reshape(param.shape[::-1])
    param.data = param.data.t()


def turn_square_state(optimizer: Sophia) -> None:
    # In the same memory too, but it is another tensor now.
    for state in optimizer.state.values():
        if state["exp_avg"].shape == (30, 30):
            state["exp_avg"] = state["exp_avg"].t()


def change_options(optimizer: Sophia) -> None:
    optimizer.param_groups[0].update(
        rho=0.5, lr=0.003, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3
    )


def forget_moments(optimizer: Sophia) -> None:
    for param in optimizer.param_groups[0]["params"][:2]:
        del optimizer.state[param]


CHANGES = [
    move,
    replace_state,
    move_state,
    load,
    add_group,
    reverse,
    transpose,
    turn_square_state,
    change_options,
    forget_moments,
]


@needs_kernel
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps_is_noticed(change, calls) -> None:
    forms = [Sophia(parameters(), lr=0.01, rho=0.2, k=3, fused=form) for form in (None, False)]
    for optimizer in forms:
        for step in (1, 2):
            take_step(optimizer, step)
        change(optimizer)
        for step in (3, 4, 5):
            take_step(optimizer, step)
    assert_alike(*forms)
    assert len(calls) >= 5


@needs_kernel
def test_gradients_that_come_and_go_are_noticed(calls) -> None:
    forms = [Sophia(parameters(), lr=0.01, rho=0.2, k=2, fused=form) for form in (None, False)]
    some = (slice(None), slice(1, 3), slice(0, 0), slice(2, 4), slice(None), slice(0, 1))
    for step, only in enumerate(some, start=1):
        for optimizer in forms:
            take_step(optimizer, step, only)
    assert_alike(*forms)
    assert len(calls) == 5  # none where there is no gradient


@needs_kernel
def test_gradients_that_lie_otherwise_are_noticed(calls) -> None:
    forms = [Sophia(parameters(), lr=0.01, rho=0.2, k=9, fused=form) for form in (None, False)]
    for optimizer in forms:
        take_step(optimizer, 1)
        for turned in (True, False):
            torch.manual_seed(2)
            for param in optimizer.param_groups[0]["params"]:
                grad = torch.randn(param.shape[::-1]).permute(tuple(range(param.dim()))[::-1])
                param.grad = grad if turned else grad.contiguous()
            optimizer.step()
    assert_alike(*forms)
    assert len(calls) == 3


@needs_kernel
def test_a_model_cast_between_steps_goes_on(calls) -> None:
    """From fp32 to bf16, whose kernel is another, and to float64, which has none."""
    forms = [Sophia(parameters(), lr=0.01, rho=0.2, k=3, fused=form) for form in (None, False)]
    for optimizer in forms:
        step = 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
            for param in optimizer.param_groups[0]["params"]:
                param.grad = None
                param.data = param.data.to(dtype)
            for _ in range(2):
                step += 1
                take_step(optimizer, step)
    # bf16 halves a difference in fp32's last bit up or down now and then.
    assert_alike(*forms, atol=0.02)
    assert len(calls) == 6


@needs_kernel
def test_layouts_and_dtypes_without_a_kernel_take_the_eager_step_beside_it(calls) -> None:
    def mixed() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [
            torch.nn.Parameter(torch.randn(40, 30)),
            torch.nn.Parameter(torch.randn(30, 40).t()),
            torch.nn.Parameter(torch.randn(20, dtype=torch.float64)),
            torch.nn.Parameter(torch.randn(20).bfloat16()),
            torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
            torch.nn.Parameter(torch.randn(7)),
        ]

    forms = [Sophia(mixed(), lr=0.01, rho=0.2, k=3, fused=form) for form in (None, False)]
    for step in range(1, 6):
        for optimizer in forms:
            take_step(optimizer, step)
    assert_alike(*forms)
    assert len(calls) == 2 * 5  # fp32 and bf16
    assert float(forms[0].clip_fraction()) == pytest.approx(float(forms[1].clip_fraction()))


@needs_kernel
@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "beside"])
@pytest.mark.parametrize(
    ("rho", "refreshed", "decay"),
    [(0.2, False, 0.1), ("auto", False, 0.0), ("auto", True, 0.1), (0.2, False, 100.0)],
)
def test_after_a_gradient_that_is_not_finite_all_is_as_before(
    where, eager, rho, refreshed, decay
) -> None:
    """Also where rho has followed the gradients, and where a decay of all leaves no way back."""
    params = parameters()
    extra = torch.nn.Parameter(torch.ones(9, dtype=torch.float64 if eager else torch.float32))
    optimizer = Sophia([*params, extra], lr=0.01, rho=rho, k=3)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    twin = copy.deepcopy(optimizer)
    for step in (1, 2, 3):
        take_step(optimizer, step)
        take_step(twin, step)
    if refreshed:
        for one in (optimizer, twin):
            one.update_hessian({p: torch.ones_like(p) for p in one.param_groups[0]["params"]})
    hurt = extra if eager else params[where]
    for one in (optimizer, twin):
        one.param_groups[0]["weight_decay"] = decay
    for param in (*params, extra):
        param.grad = torch.ones_like(param)
    hurt.grad.view(-1)[-1] = float("inf")
    with pytest.raises(
        ValueError, match=f"parameter {6 if eager else where} .*the step was not taken"
    ):
        optimizer.step()
    assert_alike(optimizer, twin)
    for one in (optimizer, twin):
        one.param_groups[0]["weight_decay"] = 0.0
        take_step(one, 4)
    assert_alike(optimizer, twin)


@needs_kernel
@pytest.mark.parametrize("rho", [0.2, "auto"])
def test_groups_alike_have_options_of_their_own(rho, calls) -> None:
    """As under a Trainer: one group that decays and one that does not."""

    def make(form: bool | None) -> Sophia:
        params = parameters() + parameters()
        half = len(params) // 2
        groups = [{"params": params[:half], "weight_decay": 0.1}, {"params": params[half:]}]
        optimizer = Sophia(groups, lr=0.01, rho=rho, k=2, fused=form)
        optimizer.param_groups[1]["lr"] = 0.02
        return optimizer

    forms = [make(form) for form in (None, False)]
    for step in range(1, 6):
        for optimizer in forms:
            take_step(optimizer, step)
    assert_alike(*forms)
    assert len(calls) == 10


@needs_kernel
def test_copies_have_kernels_of_their_own() -> None:
    optimizer = Sophia(parameters(), lr=0.01, rho=0.2, k=3)
    take_step(optimizer, 1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
        take_step(other, 2)
        assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
        assert other.fused is None


@needs_kernel
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_steady_step_makes_no_tensor_of_a_parameters_size(name) -> None:
    params = [torch.nn.Parameter(torch.randn(1000, 700)) for _ in range(3)]
    optimizer = OPTIMIZERS[name](params, lr=0.01)
    for step in range(1, 8):
        take_step(optimizer, step)
    for fused in (None, False) if name == "sophia" else (None,):
        optimizer.fused = fused
        optimizer.step()
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            optimizer.step()
        made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert largest < params[0].nbytes, (fused, largest)
        if fused is None:
            assert made < params[0].nbytes / 10


def test_fused_true_is_that_or_an_error() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    for name, make in OPTIMIZERS.items():
        if name != "sophia" or not no_kernel_because(CPU, torch.float32):
            assert make([weight], fused=True).fused is True
        with pytest.raises(ValueError, match=r"fused=True.*shape \(3,\).*float16.*None"):
            make([half], fused=True)
        meta = torch.nn.Parameter(torch.ones(3, device="meta"))
        with pytest.raises(ValueError, match="fused=True.*device 'meta'"):
            make([meta], fused=True)
        with pytest.raises(TypeError, match="fused must be True or False, got 'yes'"):
            make([weight], fused="yes")
    with pytest.raises(ValueError, match="decoupled"):
        Sophia([weight], fused=True, weight_decay=WeightDecay(0.1, weight_decouple=False))


def test_without_a_compiler_the_step_is_the_eager_one(monkeypatch) -> None:
    from hf_sophia.kernels import cpu

    monkeypatch.setattr(cpu, "missing", lambda: "there is no C compiler")
    forms = [Sophia(parameters(), lr=0.01, rho=0.2, k=3, fused=form) for form in (None, False)]
    for optimizer in forms:
        take_step(optimizer, 1)
    for one, other in zip(*(form.param_groups[0]["params"] for form in forms), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="fused=True.*no C compiler"):
        Sophia(parameters(), fused=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("size", [10, 4_000_000])
def test_a_parameter_that_changed_its_size_is_an_error(name, size) -> None:
    """As where a vocabulary is cut or grown in place: its state no longer fits."""
    param = torch.nn.Parameter(torch.ones(1000))
    optimizer = OPTIMIZERS[name]([param], lr=0.01)
    for _ in range(7):
        param.grad = torch.ones_like(param)
        optimizer.step()
    whole = torch.cat([param.data, torch.zeros(max(size - 1000, 0))])
    param.grad = None
    param.data = whole[:size] if size > 1000 else param.data[:size]
    param.grad = torch.ones(size)
    with pytest.raises(RuntimeError, match="size of tensor|shape"):
        optimizer.step()


@needs_kernel
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(name, dtype) -> None:
    options = {"rho": "auto", "target_clip_fraction": 0.5, "k": 3} if name == "sophia" else {}
    optimizer, twin = (OPTIMIZERS[name](parameters(), lr=0.01, **options) for _ in range(2))
    for step in range(1, 300 if name == "adam" else 12):
        take_step(twin, step)
    torch.set_default_dtype(dtype)
    try:
        for step in range(1, 300 if name == "adam" else 12):
            generator = torch.Generator().manual_seed(step)
            params = optimizer.param_groups[0]["params"]
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
            if isinstance(optimizer, Sophia) and optimizer.hessian_due:
                optimizer.update_hessian({p: estimate_of(p, generator) for p in params})
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(params, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_that_changes_its_memory_format_goes_on(name) -> None:
    """Its state stays as it was, in another order than the parameter."""
    options = {"rho": 0.2, "k": 3} if name == "sophia" else {}
    start = torch.randn(8, 3, 4, 5).to(memory_format=torch.channels_last)
    forms = [
        OPTIMIZERS[name]([torch.nn.Parameter(start.clone())], lr=0.01, fused=form, **options)
        for form in (None, False)
    ]
    for optimizer in forms:
        for step in range(1, 20):
            (param,) = optimizer.param_groups[0]["params"]
            if step == 8:
                param.data = param.data.contiguous()
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.empty_like(param).copy_(torch.randn(8, 3, 4, 5, generator=generator))
            if isinstance(optimizer, Sophia) and optimizer.hessian_due:
                optimizer.update_hessian({param: param.grad.square()})
            optimizer.step()
    assert_alike(*forms)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_autograd_hears_of_the_step(name) -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    other = torch.ones(5, requires_grad=True)
    optimizer = OPTIMIZERS[name]([weight], lr=0.1)
    loss = (weight * other).sum()
    weight.grad = torch.ones(5)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_a_gradient_with_its_sign_left_to_readers_is_read_right() -> None:
    results = []
    for form in (None, False):
        param = torch.nn.Parameter(torch.ones(8))
        optimizer = Sophia([param], lr=0.1, k=10**9, fused=form)
        for grad in (torch.ones(8), torch._neg_view(torch.ones(8)), torch._neg_view(torch.ones(8))):
            param.grad = grad
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@needs_kernel
def test_without_memory_of_the_gradient_the_average_is_the_gradient() -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = Sophia([param], lr=0.1, betas=(0.0, 0.9), k=10**9)
    for grad in (1.0, -1e-8):
        param.grad = torch.full((4,), grad)
        optimizer.step()
    assert torch.equal(optimizer.state[param]["exp_avg"], torch.full((4,), -1e-8))
    assert param.abs().max() < 1e-7  # back where it was: h is 0, and both steps were signs


@needs_kernel
@pytest.mark.parametrize("eps", [1e-44, 1e-60])
def test_an_eps_that_fp32_does_not_hold_makes_no_nan(eps) -> None:
    for form in (None, False):
        param = torch.nn.Parameter(torch.ones(8))
        optimizer = Sophia(
            [param], eps=eps, betas=(0.9, 0.9999), bias_correction=True, k=5, fused=form
        )
        optimizer.update_hessian({param: torch.zeros(8)})
        param.grad = torch.zeros(8)
        optimizer.step()
        assert torch.equal(param.detach(), torch.ones(8))


@needs_kernel
def test_a_refused_step_keeps_no_gradient_and_a_loaded_state_replaces_the_old() -> None:
    optimizer = Sophia(parameters(), lr=0.01, rho=0.2, k=3)
    take_step(optimizer, 1)
    params = optimizer.param_groups[0]["params"]
    for param in params:
        param.grad = torch.full_like(param, float("nan"))
    grads = [weakref.ref(param.grad) for param in params]
    with pytest.raises(ValueError, match="NaN"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)
    states = [weakref.ref(optimizer.state[param]["exp_avg"]) for param in params]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gc.collect()
    assert all(state() is None for state in states)


def test_amsgrad_is_the_groups() -> None:
    forms = [RAdam(parameters(), lr=0.01, amsgrad=True, fused=form) for form in (None, False)]
    for optimizer in forms:
        for step in range(1, 20):
            optimizer.param_groups[0]["amsgrad"] = step < 12
            take_step(optimizer, step)
    assert_alike(*forms)


@needs_kernel
def test_parameters_that_share_memory_are_updated_one_after_the_other() -> None:
    torch.set_num_threads(4)
    try:
        results = []
        for form in (None, False):
            memory = torch.zeros(300_000)
            params = [torch.nn.Parameter(memory[i * 1000 : 200_000 + i * 1000]) for i in range(3)]
            params.append(torch.nn.Parameter(torch.zeros(100_000)))
            optimizer = Sophia(params, lr=0.01, k=10**9, fused=form)
            for _ in range(3):
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            results.append([memory, params[-1].detach()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    finally:
        torch.set_num_threads(1)


def test_rho_follows_a_parameter_that_has_grown() -> None:
    param = torch.nn.Parameter(torch.zeros(50))
    optimizer = Sophia([param], lr=0.01, rho="auto", k=1, target_clip_fraction=0.5)
    for size in (50, 5000, 40):
        param.data = torch.zeros(size)
        optimizer.state.clear()
        param.grad = torch.linspace(1.0, 100.0, size)
        optimizer.update_hessian({param: torch.ones(size)})
        optimizer.step()
        assert float(optimizer.clip_fraction()) == pytest.approx(0.5, abs=0.05)


def test_only_empty_parameters_are_no_error() -> None:
    param = torch.nn.Parameter(torch.zeros(0, 3))
    optimizer = Sophia([param], lr=0.01, rho="auto", k=2)
    for step in (1, 2, 3):
        take_step(optimizer, step)
    assert float(optimizer.clip_fraction()) == 0.0


def test_a_rho_beyond_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="rho must be a number that fp32 holds, got 1e"):
        Sophia(parameters(), rho=1e39)


@needs_kernel
def test_what_is_not_fused_is_said() -> None:
    class Own(torch.nn.Parameter):
        pass

    half = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    turned = torch.nn.Parameter(torch.zeros(4, 5).t())
    params = [torch.nn.Parameter(torch.zeros(7)), half, turned, Own(torch.zeros(2))]
    found = Sophia(params).not_fused()
    assert sorted(found.values()) == [2, 3, 20]
    assert any("float16" in reason for reason in found)
    assert Sophia(params, fused=False).not_fused() == {"fused is False": 32}
    assert Adam(params[:1]).not_fused() == {}


@needs_kernel
def test_a_threshold_of_another_dtype_is_read_right() -> None:
    forms = [Sophia(parameters(), lr=0.01, rho="auto", k=9, fused=form) for form in (None, False)]
    for optimizer in forms:
        take_step(optimizer, 1)
        for state in optimizer.state.values():
            state["rho"] = state["rho"].double()
        take_step(optimizer, 2)
    assert_alike(*forms)
    assert 0.0 < float(forms[0].clip_fraction()) < 1.0


@pytest.fixture
def late_kernel(monkeypatch) -> None:
    """The CPU's kernel, telling of what is not finite when it is asked to wait, as on CUDA."""
    told = cpu.CpuStep.finite
    seen: dict[int, bool] = {}

    def finite(self, *, wait: bool = False) -> bool:
        seen[id(self)] = seen.get(id(self), True) and told(self)
        return seen[id(self)] if wait else True

    monkeypatch.setattr(cpu.CpuStep, "late", True)
    monkeypatch.setattr(cpu.CpuStep, "finite", finite)


@needs_kernel
def test_what_the_last_step_spoilt_is_not_saved(late_kernel) -> None:
    optimizer = Sophia(parameters(), lr=0.01, rho=0.1, k=9)
    take_step(optimizer, 1)
    optimizer.state_dict()
    params = optimizer.param_groups[0]["params"]
    params[0].grad[3] = float("nan")
    optimizer.step()
    with pytest.raises(ValueError, match="a gradient of an earlier step held NaN or infinity"):
        optimizer.state_dict()


@needs_kernel
def test_what_no_kernel_takes_is_named_where_kernels_tell_late(late_kernel) -> None:
    params = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8).double())]
    optimizer = Sophia(zip("ab", params, strict=True), lr=0.1, rho=1.0)
    optimizer.update_hessian({param: torch.ones_like(param) for param in params})
    for param in params:
        param.grad = torch.ones_like(param)
    params[1].grad[3] = float("nan")
    with pytest.raises(ValueError, match="gradient of parameter 'b' .* the step was not taken"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones_like(param)) for param in params)
    params[1].grad[3] = 1.0
    optimizer.step()
    assert all((param < 1.0).all() for param in params)


@needs_kernel
def test_parameters_that_share_memory_keep_their_plan(monkeypatch) -> None:
    made = []
    make = KernelPlan._make
    monkeypatch.setattr(KernelPlan, "_make", lambda *args: (made.append(1), make(*args)))
    whole = torch.zeros(10)
    views = [torch.nn.Parameter(whole[:6]), torch.nn.Parameter(whole[4:])]
    params = [*views, torch.nn.Parameter(torch.zeros(3))]
    optimizer = Sophia(params, lr=0.01, k=9)
    for step in range(1, 6):
        take_step(optimizer, step)
    assert len(made) == 1
    views[1].data = torch.zeros(6)  # moved apart
    take_step(optimizer, 6)
    take_step(optimizer, 7)
    assert len(made) == 2
    assert not optimizer._plans[0].rest


@needs_kernel
def test_parameters_that_are_gone_are_let_go_of() -> None:
    params = parameters()
    optimizer = Sophia([{"params": params[:3]}, {"params": params[3:]}], rho="auto", k=1)
    take_step(optimizer, 1)
    gone = weakref.ref(params[3])
    for param in optimizer.param_groups.pop()["params"]:
        del optimizer.state[param]
    del param, params[3:]
    take_step(optimizer, 2)
    gc.collect()
    assert gone() is None


@needs_kernel
@pytest.mark.parametrize("form", [None, False])
def test_an_average_beyond_fp32_leaves_a_finite_parameter(form) -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = Sophia([param], lr=0.01, k=9, fused=form)
    optimizer.update_hessian({param: torch.ones(2)})
    for sign in (1.0, -1.0, -1.0):
        param.grad = torch.full((2,), sign * 3e38)
        optimizer.step()
    assert param.isfinite().all()


@needs_kernel
def test_large_tensors_are_shared_out_among_threads(monkeypatch) -> None:
    threads = []
    parallel = cpu._parallel()
    if parallel is None:
        pytest.skip("torch was built without GNU OpenMP")

    def watched(step, job, count, flags) -> None:
        threads.append(count)
        parallel(step, job, count, flags)

    monkeypatch.setattr(cpu, "_parallel", lambda: watched)
    param = torch.nn.Parameter(torch.zeros(1_000_000))
    optimizer = Sophia([param], lr=0.01)
    torch.set_num_threads(2)
    try:
        take_step(optimizer, 1)
    finally:
        torch.set_num_threads(1)
    assert threads == [2]
