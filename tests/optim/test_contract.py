"""What every optimizer of the table promises, whatever its equation is."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from hf_sophia import WeightDecay
from hf_sophia.optim import OPTIMIZERS, Sophia

pytestmark = pytest.mark.filterwarnings("ignore:Sophia steps without")

SPECIFIED = {
    "adam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-16,
        "weight_decay": WeightDecay(),
        "optimized_update": True,
        "defaults": None,
        "fused": None,
    },
    "radam": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-16,
        "weight_decay": WeightDecay(),
        "optimized_update": True,
        "amsgrad": False,
        "degenerated_to_sgd": True,
        "defaults": None,
        "fused": None,
    },
    "sophia": {
        "lr": 1e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-12,
        "rho": 0.03,
        "weight_decay": WeightDecay(),
        "defaults": None,
        "k": 10,
        "hessian_computation_type": "gnb",
        "target_clip_fraction": 0.5,
        "rho_scope": "tensor",
        "nesterov": False,
        "bias_correction": False,
        "fused": None,
    },
}


@pytest.fixture(params=OPTIMIZERS)
def name(request) -> str:
    return request.param


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(
        dtype
    )


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0):
    for step in range(start, start + steps):
        torch.manual_seed(step)
        dtype = next(model.parameters()).dtype
        x, y = torch.randn(16, 4).to(dtype), torch.randint(3, (16,))
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        if isinstance(optimizer, Sophia):
            loss.backward(retain_graph=True)
            optimizer.step(logits=logits)
        else:
            loss.backward()
            optimizer.step()


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in model.parameters()]
    for param in model.parameters():
        state = optimizer.state[param]
        tensors += [
            value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
            for _, value in sorted(state.items())
        ]
    return tensors


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_signature_is_the_specified_one(name) -> None:
    parameters = list(inspect.signature(OPTIMIZERS[name]).parameters.values())
    assert parameters[0].name == "params"
    assert {p.name: p.default for p in parameters[1:]} == SPECIFIED[name]
    assert [p.name for p in parameters[1:]] == list(SPECIFIED[name])
    keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    # `specs/` ends with defaults; what comes after them is the package's own.
    later = list(SPECIFIED[name])[list(SPECIFIED[name]).index("defaults") + 1 :]
    assert keyword_only == set(later)
    assert issubclass(OPTIMIZERS[name], torch.optim.Optimizer)


def test_state_dict_round_trip_through_weights_only_file(name) -> None:
    model = model_of()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    train(model, optimizer, 13)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other_model = model_of()
    other_model.load_state_dict(model.state_dict())
    other = OPTIMIZERS[name](other_model.parameters(), lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(snapshot(model, optimizer), snapshot(other_model, other))
    train(model, optimizer, 12, start=13)
    train(other_model, other, 12, start=13)
    assert_equal(snapshot(model, optimizer), snapshot(other_model, other))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(name, copier) -> None:
    model = model_of()
    decay = WeightDecay(0.1, weight_decouple=False)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01, weight_decay=decay)
    train(model, optimizer, 13)
    other_model, other = copier((model, optimizer))
    assert other.weight_decay == decay
    train(model, optimizer, 12, start=13)
    train(other_model, other, 12, start=13)
    assert_equal(snapshot(model, optimizer), snapshot(other_model, other))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_state_is_fp32_at_least_and_stays_so_on_load(name, dtype, expected) -> None:
    model = model_of(dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    kept = snapshot(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(kept, snapshot(model, optimizer))
    for param in model.parameters():
        assert param.dtype == dtype
        for value in optimizer.state[param].values():
            if isinstance(value, torch.Tensor):
                assert value.dtype == expected
                assert value.shape == param.shape


def test_bf16_takes_the_fp32_step_rounded_once(name) -> None:
    torch.manual_seed(0)
    start = torch.randn(50).bfloat16()
    grad = torch.randn(50).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        param = torch.nn.Parameter(start.to(dtype, copy=True))
        param.grad = grad.to(dtype)
        OPTIMIZERS[name]([param], lr=0.01, weight_decay=0.1).step()
        results.append(param.detach().bfloat16())
    assert torch.equal(*results)


def test_groups_have_options_of_their_own(name) -> None:
    grad = torch.tensor([3.0, -2.0])
    params = [torch.nn.Parameter(torch.tensor([1.0, -1.0])) for _ in range(3)]
    special = {"lr": 0.02, "betas": (0.5, 0.6), "weight_decay": 0.3}
    if name == "sophia":
        special["rho"] = 2.0
    cls = OPTIMIZERS[name]
    joint = cls([{"params": params[:1]}, {"params": params[1:2], **special}], lr=0.1)
    joint.add_param_group({"params": params[2:], "lr": 0.0})
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    others = [cls(alone[:1], lr=0.1), cls(alone[1:2], **special), cls(alone[2:], lr=0.0)]
    for _ in range(5):
        for param in params + alone:
            param.grad = grad.clone()
        for optimizer in (joint, *others):
            if name == "sophia" and optimizer.hessian_due:
                held = [p for g in optimizer.param_groups for p in g["params"]]
                optimizer.update_hessian({p: torch.full((2,), 40.0) for p in held})
            optimizer.step()
    for param, other in zip(params, alone, strict=True):
        assert torch.equal(param, other)
    assert torch.equal(params[2], torch.tensor([1.0, -1.0]))
    assert not torch.equal(params[0], params[1])


def test_parameters_without_gradient_are_skipped(name) -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = OPTIMIZERS[name]([used, unused, frozen], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))
    assert unused not in optimizer.state


def test_closure_runs_with_gradients_and_its_loss_comes_back(name) -> None:
    param = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = OPTIMIZERS[name]([param], lr=0.1)

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 1.0
    assert param.item() < 1.0
    assert optimizer.step() is None


def test_sparse_and_complex_are_refused_clearly(name) -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = OPTIMIZERS[name](embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*shape \(5, 2\).*sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match="complex"):
        OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name, bad) -> None:
    good, broken = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OPTIMIZERS[name]([("good", good), ("broken", broken)], lr=0.1, weight_decay=0.5)
    good.grad, broken.grad = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    with pytest.raises(ValueError, match=r"gradient of parameter 'broken'.*NaN or infinity"):
        optimizer.step()
    assert torch.equal(good, torch.ones(3))
    assert torch.equal(broken, torch.ones(3))
    assert all("exp_avg" not in s or not s["exp_avg"].any() for s in optimizer.state.values())


def test_a_step_that_a_cuda_graph_captures_is_refused(name, monkeypatch) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([param])
    param.grad = torch.ones(3)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph.*Capture forward"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))
    assert not optimizer.state


def test_huge_finite_gradients_are_no_false_alarm(name) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.full((3,), 1e30)
    optimizer = OPTIMIZERS[name]([param], lr=0.1)
    optimizer.step()
    assert torch.isfinite(param).all()


BAD_OPTIONS = [
    ({"lr": -0.1}, "lr.*-0.1"),
    ({"lr": float("nan")}, "lr.*nan"),
    ({"lr": "fast"}, "lr.*'fast'"),
    ({"eps": -1e-8}, "eps.*-1e-08"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\].*1.0"),
    ({"betas": (0.9, -0.1)}, r"betas\[1\].*-0.1"),
    ({"betas": 0.9}, "betas.*0.9"),
    ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
    ({"defaults": {"lr": 5.0}}, "pass lr=5.0 as an argument instead"),
]
BAD_OPTIONS_OF = {
    "sophia": [
        ({"rho": -1.0}, "rho.*-1.0"),
        ({"rho": 0.0}, "rho.*0.0"),
        ({"eps": 0.0}, "eps.*0.0"),
        ({"k": 0}, "k.*0"),
        ({"k": 2.5}, "k.*2.5"),
        ({"hessian_computation_type": "exact"}, "'gnb', 'hutchinson', got 'exact'"),
    ],
    "adam": [({"optimized_update": "no"}, "optimized_update.*'no'")],
    "radam": [({"amsgrad": 1}, "amsgrad.*1")],
}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(n, o, m) for n in OPTIMIZERS for o, m in BAD_OPTIONS + BAD_OPTIONS_OF[n]],
    indirect=["name"],
)
def test_bad_options_name_the_value(name, options, message) -> None:
    param = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises((ValueError, TypeError), match=message):
        OPTIMIZERS[name]([param], **options)
    if "defaults" not in options:
        optimizer = OPTIMIZERS[name]([param])
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], **options})
        assert len(optimizer.param_groups) == 1


def test_defaults_reach_groups_and_are_not_changed(name) -> None:
    defaults = {"tag": "encoder", "betas": list(SPECIFIED[name]["betas"])}
    optimizer = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(1))], defaults=defaults)
    assert optimizer.param_groups[0]["tag"] == "encoder"
    assert defaults["tag"] == "encoder"
    assert len(defaults) == 2


def test_a_foreign_state_dict_is_refused_and_nothing_changes(name) -> None:
    model = model_of()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    kept = snapshot(model, optimizer)

    foreign_model = model_of()
    foreign = torch.optim.RMSprop(foreign_model.parameters())
    train(foreign_model, foreign, 1)
    with pytest.raises(ValueError, match="not saved by"):
        optimizer.load_state_dict(foreign.state_dict())

    fewer = OPTIMIZERS[name](list(model_of().parameters())[:2])
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters"):
        optimizer.load_state_dict(fewer.state_dict())

    wrong_shape = copy.deepcopy(optimizer.state_dict())
    wrong_shape["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"exp_avg\s+has shape \(2, 2\)"):
        optimizer.load_state_dict(wrong_shape)

    wrong_keys = copy.deepcopy(optimizer.state_dict())
    wrong_keys["state"][0]["momentum_buffer"] = wrong_keys["state"][0].pop("exp_avg")
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.load_state_dict(wrong_keys)
    assert_equal(kept, snapshot(model, optimizer))


def test_state_survives_a_deepcopied_load_without_sharing_memory(name) -> None:
    model = model_of()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    frozen = saved["state"][0]["exp_avg"].clone()
    other = OPTIMIZERS[name](model_of().parameters(), lr=0.01)
    other.load_state_dict(saved)
    for state in other.state.values():
        state["exp_avg"].zero_()
    assert torch.equal(saved["state"][0]["exp_avg"], frozen)


def test_learning_rate_schedulers_and_weight_decay_of_groups_work(name) -> None:
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = OPTIMIZERS[name]([param], lr=1.0, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    param.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    assert param.item() == 1.0
