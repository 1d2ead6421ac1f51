import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from recfx.layers import in_bf16, products
from recfx.models import deepfm
from tests.reference import DeepFM, fm


def case(num_numeric, num_sparse, dim, hidden, *, batch=16, seed=0, scale=300.0):
    config = deepfm.DeepFMConfig(num_numeric=num_numeric, num_sparse=num_sparse, dim=dim, hidden=hidden)
    g = torch.Generator().manual_seed(seed)
    params = deepfm.init(config, g)
    params |= {name: params[name] * scale for name in ("numeric_emb", "numeric_bias")}
    emb = {
        "emb": torch.randn(batch, num_sparse, dim, generator=g) * 0.3,
        "bias": torch.randn(batch, num_sparse, 1, generator=g) * 0.3,
    }
    return params, emb, torch.randn(batch, num_numeric, generator=g)


SHAPES = [
    (13, 26, 8, (64, 16)), (2, 3, 4, (8, 4)), (1, 1, 1, (3,)), (3, 5, 2, (4, 3, 2)), (4, 2, 3, ()), (2, 5, 8, (3,)),
    (1, 17, 1, (3,)),
]  # fmt: skip


@pytest.fixture(params=["products", "sums"])
def _form(request, monkeypatch):
    """As it is written for a CPU and for CUDA."""
    monkeypatch.setattr(products, "LOOPS_ON", ("cpu",) if request.param == "sums" else ())


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_are_the_plain_module(shape):
    """In float64, where the two orders of summation cannot hide a difference."""
    params, emb, numeric = case(*shape)
    params, emb = ({k: t.double().requires_grad_() for k, t in group.items()} for group in (params, emb))
    naive = DeepFM({name: p.detach() for name, p in params.items()})
    other = {name: t.detach().clone().requires_grad_() for name, t in emb.items()}
    logit = deepfm.forward(params, emb, {"numeric": numeric.double()})
    expected = naive(other["emb"], other["bias"], numeric.double())
    assert logit.shape == (16, 1)
    torch.testing.assert_close(logit, expected, rtol=1e-11, atol=1e-12)

    (logit * torch.linspace(-1, 1, 16)[:, None]).sum().backward()
    (expected * torch.linspace(-1, 1, 16)[:, None]).sum().backward()
    for name, grad in naive.grads().items():
        torch.testing.assert_close(params[name].grad, grad, rtol=1e-9, atol=1e-12)
    for name in emb:
        torch.testing.assert_close(emb[name].grad, other[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_logits(shape):
    params, emb, numeric = case(*shape)
    naive = DeepFM(params).double()
    expected = naive(emb["emb"].double(), emb["bias"].double(), numeric.double())
    logit = deepfm.forward(params, emb, {"numeric": numeric}).double()
    torch.testing.assert_close(logit, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("run", "rtol"), [(lambda f: f, 2e-5), (in_bf16, 4 * 2**-8)], ids=["fp32", "bf16"])
def test_both_forms_have_the_same_gradients_of_functions(shape, run, rtol, monkeypatch):
    """As a step takes them, by `torch.func`: of parameters, embeddings and biases; relative to the largest of each."""
    params, emb, numeric = case(*shape)

    def loss(params, emb):
        return (run(deepfm.forward)(params, emb, {"numeric": numeric}) * torch.linspace(-1, 1, 16)[:, None]).sum()

    both = []
    for loops_on in ((), ("cpu",)):
        monkeypatch.setattr(products, "LOOPS_ON", loops_on)
        of_params, of_emb = torch.func.grad(loss, argnums=(0, 1))(params, emb)
        both.append({**of_params, **of_emb})
    for name, grad in both[0].items():
        assert grad.dtype == both[1][name].dtype == torch.float32
        assert (grad - both[1][name]).abs().max() <= rtol * grad.abs().max() + 1e-7, name


def test_on_cuda_the_widths_of_layers_alone_are_products(monkeypatch):
    """Each product is a launch there, and so is each matrix that is shaped for one."""
    monkeypatch.setattr(products, "LOOPS_ON", ("cpu",))
    params, emb, numeric = case(13, 26, 8, (64, 16))
    graph = make_fx(deepfm.forward)(params, emb, {"numeric": numeric}).graph
    names = {node.target.__name__ for node in graph.nodes if node.op == "call_function"}
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 2
    assert not names & {"cat.default", "eye.default", "constant_pad_nd.default", "block_diag.default"}


def test_second_order_term_is_the_double_loop_over_pairs():
    params, emb, numeric = (
        {k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double() for x in case(2, 3, 4, (8, 4))
    )
    for name in params:
        if name != "numeric_emb":
            params[name] = torch.zeros_like(params[name])
    emb["bias"] = torch.zeros_like(emb["bias"])
    weight = torch.cat([numeric, torch.ones(16, 3)], dim=1)
    fields = torch.cat([params["numeric_emb"].expand(16, -1, -1), emb["emb"]], dim=1)
    torch.testing.assert_close(
        deepfm.forward(params, emb, {"numeric": numeric}), fm(weight, fields), rtol=1e-10, atol=1e-12
    )


def test_missing_features_contribute_nothing():
    """Zero embedding, zero bias, numeric 0: what is left is the MLP over the numeric embeddings."""
    params, emb, _ = case(2, 3, 4, (8, 4))
    zeros = {name: torch.zeros_like(t) for name, t in emb.items()}
    logit = deepfm.forward(params, zeros, {"numeric": torch.zeros(16, 2)})
    x = torch.cat([params["numeric_emb"].flatten(), torch.zeros(12)])
    for i in range(3):
        x = x @ params[f"dnn.{i}.weight"] + params[f"dnn.{i}.bias"]
        x = x.relu() if i < 2 else x
    torch.testing.assert_close(logit, x.expand(16, 1), rtol=1e-5, atol=1e-6)


def test_the_seeds_configuration_has_21_206_dense_parameters():
    config = deepfm.DeepFMConfig(num_numeric=13, num_sparse=26)
    params = deepfm.init(config, torch.Generator().manual_seed(42))
    assert sum(p.numel() for p in params.values()) == 21_206
    assert abs(params["numeric_emb"].std() / 0.001 - 1) < 0.3
    bound = (39 * 8) ** -0.5
    assert 0.99 * bound < params["dnn.0.weight"].abs().max() <= bound
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in params.values())


def test_init_depends_on_the_generator_alone():
    config = deepfm.DeepFMConfig(num_numeric=2, num_sparse=3)
    torch.manual_seed(1)
    a = deepfm.init(config, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    b = deepfm.init(config, torch.Generator().manual_seed(5))
    c = deepfm.init(config, torch.Generator().manual_seed(6))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
