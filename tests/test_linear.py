"""Linear layers with oneDNN's kernel: the same numbers as PyTorch's, and where it must not be taken."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rae.encoder import tiny_encoder
from rae.io.tensors import state_hash
from rae.layers import GELUMlp, Linear, linear, pack_weights, unpack_weights
from rae.layers.linear import PackedLinear


class Calls(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def quick(work) -> bool:
    with Calls() as calls:
        work()
    return "mkldnn::_linear_pointwise" in calls.names


AT_HAND = torch.backends.mkldnn.is_available()
"""Whether PyTorch was built with oneDNN, as its wheels are."""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 7, 16), (2, 3, 4, 16)])
def test_equals_pytorch(shape, gelu: bool, bias: bool):
    draws = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=draws), torch.randn(24, 16, generator=draws)
    shift = torch.randn(24, generator=draws) if bias else None
    transposed = torch.randn(2, 16, 7, generator=draws).transpose(1, 2)  # as a latent's tokens are
    for given in (x, transposed):
        expected = F.linear(given.double(), weight.double(), None if shift is None else shift.double())
        expected = (F.gelu(expected) if gelu else expected).float()
        with torch.no_grad():
            torch.testing.assert_close(linear(given, weight, shift, gelu), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(linear(given, weight, shift, gelu), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 7, 16)])
def test_gradients_equal_pytorchs(shape, frozen: bool, bias: bool):
    draws = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=draws) for size in (shape, (24, 16), 24)]
    direction = torch.randn(*shape[:-1], 24, generator=draws)

    def gradients(function, dtype):
        x, weight, shift = (value.to(dtype).clone() for value in values)
        wanted = [x] if frozen else [x, weight, shift][: 3 if bias else 2]
        for value in wanted:
            value.requires_grad_()
        out = function(x, weight, shift if bias else None)
        return torch.autograd.grad((out * direction.to(dtype)).sum(), wanted)

    for given, expected in zip(gradients(linear, torch.float32), gradients(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(given, expected.float(), rtol=1e-5, atol=1e-5)


def test_taken_in_float32_and_only_there():
    layer, x = Linear(16, 24), torch.randn(3, 16)
    assert quick(lambda: layer(x)) == AT_HAND
    out = layer(x.requires_grad_())
    assert quick(lambda: out.sum().backward()) == AT_HAND
    with torch.no_grad():
        assert quick(lambda: layer(x)) == AT_HAND
        assert quick(lambda: GELUMlp(16, 8)(x)) == AT_HAND
        assert not quick(lambda: Linear(16, 24).double()(x.double()))
        with torch.autocast("cpu", torch.bfloat16):
            assert not quick(lambda: layer(x))
            assert layer(x).dtype == torch.bfloat16
        assert layer(torch.zeros(0, 16)).shape == (0, 24)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.zeros(2, 7))
    with torch.inference_mode():
        assert quick(lambda: layer(x.detach())) == AT_HAND


@pytest.mark.parametrize("bias", [True, False])
def test_no_gradient_is_computed_that_a_pass_does_not_ask_for(bias: bool):
    def counts(kind):
        first, second = kind(8, 16, bias=bias), kind(16, 8, bias=bias)
        x = torch.randn(2, 3, 8, requires_grad=True)
        out = second(first(x)).sum()
        for wanted in ([x], [second.weight], [first.weight], [x, *first.parameters(), *second.parameters()]):
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(out, wanted, retain_graph=True)
            yield counter.get_total_flops()

    assert list(counts(Linear)) == list(counts(torch.nn.Linear))


@pytest.mark.parametrize("grad", [True, False])
def test_function_transformations_and_higher_gradients_are_pytorchs(grad: bool):
    layer, x, tangent = Linear(16, 24), torch.randn(3, 16), torch.randn(3, 16)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.vmap(layer)(x), F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], F.linear(tangent, layer.weight))
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(out, F.linear(tangent, layer.weight))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curvature, 2 * (torch.ones_like(x) @ layer.weight.t()) @ layer.weight)


def test_adds_a_residual_on_the_way():
    mlp, x = GELUMlp(16, 24), torch.randn(2, 3, 16)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x, x), x + mlp(x))
        torch.testing.assert_close(mlp(x, x.transpose(0, 1).contiguous().transpose(0, 1)), x + mlp(x))
    torch.testing.assert_close(mlp(x, x), x + mlp(x))


def test_its_operations_are_counted():
    layer, x = Linear(16, 24), torch.randn(2, 3, 16)
    for inside in (torch.no_grad, torch.enable_grad):
        with inside(), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 2 * 3 * 16 * 24
        with inside(), FlopCounterMode(display=False) as counter:
            GELUMlp(16, 24)(x, x)
        assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 16 * 24


def test_an_encoder_of_timm_takes_it_and_keeps_its_names():
    encoder = tiny_encoder()
    assert "network.blocks.0.attn.qkv.weight" in encoder.state_dict()
    assert quick(lambda: encoder(torch.rand(1, 3, 32, 32))) == AT_HAND


def packed_network() -> tuple[torch.nn.Module, torch.Tensor]:
    """A network after a call that has packed its weights, and that call's input."""
    torch.manual_seed(0)
    network = pack_weights(torch.nn.Sequential(Linear(16, 24, bias=False), GELUMlp(24, 40)).eval())
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        network(x)
    return network, x


def packed(network: torch.nn.Module) -> list[bool]:
    return [isinstance(module, PackedLinear) for module in network.modules() if isinstance(module, Linear)]


def test_packed_weights_give_the_same_numbers_and_state():
    torch.manual_seed(0)
    network = torch.nn.Sequential(Linear(16, 24, bias=False), GELUMlp(24, 40)).eval()
    x, residual, before = torch.randn(2, 7, 16), torch.randn(2, 7, 24), state_hash(network.state_dict())
    pack_weights(network)
    assert packed(network) == [False] * 3, "before the first call"
    expected = network[1](network[0](x), residual)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(network[1](network[0](x), residual), expected)
        assert packed(network) == [AT_HAND] * 3
        assert state_hash(network.state_dict()) == before
    assert quick(lambda: packed_network()) == AT_HAND
    unpack_weights(network)
    assert packed(network) == [False] * 3
    assert [name for name, _ in network.named_parameters()] == list(network.state_dict())
    assert state_hash(network.state_dict()) == before
    with torch.no_grad():
        network(x)
    assert packed(network) == [False] * 3, "unpack_weights is for good"


@pytest.mark.parametrize(
    "ask",
    [
        lambda network, x: network.train(),
        lambda network, x: network.double(),
        lambda network, x: network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()}),
        lambda network, x: copy.deepcopy(network),
        lambda network, x: pickle.loads(pickle.dumps(network)),
    ],
    ids=["training", "another type", "other values", "a copy", "pickle"],
)
def test_packed_weights_are_plain_again_for_what_needs_them(ask):
    network, x = packed_network()
    assert packed(network) == [AT_HAND] * 3
    state = {name: value.clone() for name, value in network.state_dict().items()}
    found = ask(network, x)
    assert packed(network) == [False] * 3
    weights = [module.weight for module in network.modules() if isinstance(module, Linear)]
    assert all(isinstance(weight, torch.nn.Parameter) and weight.requires_grad for weight in weights)
    shift = 1 if "missing_keys" in dir(found) else 0
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value.float(), state[name] + shift, rtol=0, atol=0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda network, x: network(x),
        lambda network, x: torch.no_grad()(torch.vmap(network))(x),
        lambda network, x: torch.func.jvp(network, (x,), (x,))[0],
        lambda network, x: torch.no_grad()(torch.autocast("cpu", torch.bfloat16)(network))(x),
        lambda network, x: torch.no_grad()(network.double)()(x.double()),
    ],
    ids=["gradients", "vmap", "jvp", "autocast", "another type"],
)
def test_packed_weights_serve_every_call(ask):
    network, x = packed_network()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    plain = unpack_weights(copy.deepcopy(network))
    with torch.no_grad():
        network(x)  # packs again
    expected, found = (ask(one, x) for one in (plain, network))
    torch.testing.assert_close(found, expected)
    for name, value in network.state_dict().items():
        assert type(value) is torch.Tensor
        torch.testing.assert_close(value.float(), state[name], rtol=0, atol=0)
    x = x.clone().requires_grad_()
    slopes = [torch.autograd.grad(one.float()(x).sum(), x)[0] for one in (plain, network)]
    torch.testing.assert_close(*slopes)


def test_an_optimiser_made_before_packing_trains_afterwards():
    torch.manual_seed(0)
    network = pack_weights(Linear(16, 24))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x, before = torch.randn(3, 16), network.weight.clone()
    with torch.no_grad():
        network.eval()(x)
    network.requires_grad_(False).requires_grad_(True)  # while it is packed
    network.train()(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(network.weight, before - x.sum(0).expand(24, -1))


def test_no_optimiser_takes_packed_weights():
    network, _ = packed_network()
    assert packed(network) == [AT_HAND] * 3
    with pytest.raises(
        RuntimeError, match=r"packed for evaluation; call rae.layers.unpack_weights\(model\) or model.train"
    ):
        torch.optim.AdamW(network.parameters())
    groups = torch.optim.AdamW(network.train().parameters()).param_groups
    assert [parameter.numel() > 0 for parameter in groups[0]["params"]] == [True] * len(list(network.parameters()))


def test_layers_of_a_class_of_their_own_and_shared_weights_are_left_alone():
    class Shifted(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 100

    network = torch.nn.ModuleList([Shifted(16, 16), Linear(16, 16), Linear(16, 16)])
    network[2].weight = network[1].weight
    pack_weights(network.eval())
    x = torch.randn(3, 16)
    with torch.no_grad():
        for layer in network:
            torch.testing.assert_close(layer(x), layer(x))
    assert packed(network) == [False] * 3
    assert network[2].weight is network[1].weight


def test_threads_may_share_the_first_call():
    torch.manual_seed(0)
    x = torch.randn(2, 16)
    for _ in range(20):
        network = torch.nn.Sequential(*(Linear(16, 16) for _ in range(8))).eval()
        with torch.no_grad():
            expected = network(x)
        pack_weights(network)
        ready = threading.Barrier(4)

        def call(network=network, ready=ready):
            ready.wait()
            with torch.no_grad():
                return network(x)

        with ThreadPoolExecutor(4) as pool:
            for found in [pool.submit(call) for _ in range(4)]:
                torch.testing.assert_close(found.result(), expected)


def test_a_hook_sees_a_layers_own_output():
    mlp, x, seen = GELUMlp(16, 24), torch.randn(2, 16), []
    mlp.fc2.register_forward_hook(lambda layer, given, out: seen.append(out))
    with torch.no_grad():
        out = mlp(x, x)
    torch.testing.assert_close(seen[0] + x, out)


def test_a_packed_weight_is_not_given_away_and_new_values_count():
    network, x = packed_network()
    with pytest.raises(RuntimeError, match="unpack_weights") if AT_HAND else contextlib.nullcontext():
        assert network[0].weight.shape == (24, 16)
    zeros = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    network.load_state_dict(zeros)
    with torch.no_grad():
        assert float(network(x).abs().max()) == 0
    assert packed(network) == [AT_HAND] * 3, "it packs anew"
    unpack_weights(network)[0].weight.data.fill_(1)
    with torch.no_grad():
        torch.testing.assert_close(network[0](x), x.sum(-1, keepdim=True).expand(-1, -1, 24))


def test_weights_in_training_mode_are_not_packed():
    network = pack_weights(Linear(16, 24))
    with torch.no_grad():
        network(torch.randn(3, 16))
    assert packed(network) == [False]
