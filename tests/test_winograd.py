"""Winograd's convolutions against torch's own in float64, alone and in networks."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralvae import winograd
from spectralvae.model import AutoencoderKL
from spectralvae.runtime.placement import place
from spectralvae.winograd import conv2d, use_winograd

CPU = torch.device("cpu")
WIDE = {"shape": (260, 32, 64), "chs": (256, 256), "z_channels": 4, "mid_attn": True}


@pytest.fixture(autouse=True)
def capable(monkeypatch):
    """The algorithm is right on every processor; only whether it is taken depends on which."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def relative(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


def with_gradients(function, *tensors):
    """The output and the gradients of a fixed weighted sum of it."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).cos().view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize(("size", "threads"), [((32, 32), 1), ((34, 40), 2), ((64, 36), 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(size, layout, threads):
    torch.manual_seed(0)
    x = torch.randn(3, 7, *size).to(memory_format=layout)
    w, bias = torch.randn(5, 7, 3, 3).to(memory_format=layout), torch.randn(5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = with_gradients(conv2d, x, w, bias)
    finally:
        torch.set_num_threads(before)
    expected = with_gradients(lambda *t: F.conv2d(*t, padding=1), *(t.double() for t in (x, w, bias)))
    for mine, truth in zip(found, expected, strict=True):
        assert relative(mine, truth) < 2e-6
    assert found[2].stride() == w.stride()  # as fused optimizers need it
    assert "_Winograd" in type(conv2d(x, w.requires_grad_(), bias).grad_fn).__name__


def test_no_gradient_that_is_not_wanted():
    x, w, bias = torch.randn(1, 4, 32, 32), torch.randn(3, 4, 3, 3), torch.randn(3)
    for wanted in range(3):
        tensors, expected = (
            [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, w, bias))] for _ in range(2)
        )
        conv2d(*tensors).sum().backward()
        F.conv2d(*expected, padding=1).sum().backward()
        for i, (mine, theirs) in enumerate(zip(tensors, expected, strict=True)):
            assert (mine.grad is None) == (i != wanted)
            if i == wanted:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-4)


def test_results_are_repeatable_and_do_not_share_memory():
    """The scratch memory of one call must not show through in another's result, be it in another thread."""
    torch.manual_seed(0)
    images = [torch.randn(2, 6, 64, 64), torch.randn(1, 6, 32, 34)]
    w = torch.randn(8, 6, 3, 3)
    first = conv2d(images[0], w, None)
    kept = [first.clone(), conv2d(images[1], w, None)]
    assert torch.equal(first, kept[0])
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda i: conv2d(images[i % 2], w, None), range(40)))
    assert all(relative(found, kept[i % 2].double()) < 1e-5 for i, found in enumerate(again))


def test_what_is_left_to_torch():
    x, w = torch.randn(1, 4, 34, 64), torch.randn(3, 4, 3, 3)
    for given in (x[..., :33, :], x[..., :33], x[..., :16, :], x.double()):
        weights = w.to(given.dtype)
        assert torch.equal(conv2d(given, weights, None), F.conv2d(given, weights, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, w, None).dtype == torch.bfloat16


def trained(network):
    """Deterministic weights, none of which is zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return network


def test_network_is_the_same():
    """Loss and gradients of a network with wide convolutions, against the plain one's in float64; those of an l1 loss
    are sums of signs, some of which rounding turns."""
    torch.manual_seed(1)
    plain = trained(AutoencoderKL(WIDE, nll_loss_type="l2"))
    fast = copy.deepcopy(plain)
    assert place(fast, CPU) == torch.channels_last
    assert sum(isinstance(m, winograd._Conv2d) for m in fast.modules()) == 18  # all but Z -> 256 and 256 -> 2 Z
    assert list(fast.state_dict()) == list(plain.state_dict())
    plain.double()
    x = torch.randn(2, 260, 32, 64)
    mask = torch.rand(x.shape) > 0.1
    noise = torch.randn(2, 8, 16, 32)
    losses = []
    for network, dtype in ((plain, torch.float64), (fast, torch.float32)):
        loss, _ = network.get_loss(x.to(dtype), mask, noise.to(dtype))
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert float((q.grad.double() - p.grad).abs().max()) < 1e-5 * largest, name
            assert q.grad.stride() == q.stride()


class Adapted(nn.Conv2d):
    """A layer of somebody else's."""


def test_other_layers_processors_and_plain_networks_stay(monkeypatch):
    for conv in (
        nn.Conv2d(256, 255, 3, padding=1),
        nn.Conv2d(255, 256, 3, padding=1),
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 5, padding=2),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, stride=2, padding=1),
        nn.Conv2d(256, 256, 3, padding=1, groups=2),
        nn.Conv2d(256, 256, 3, padding=1, dilation=2),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(256, 256, 3, padding=1),
        nn.Conv3d(256, 256, 3, padding=1),
        Adapted(256, 256, 3, padding=1),
    ):
        before = type(conv)
        assert not use_winograd(nn.Sequential(conv))
        assert type(conv) is before
        assert place(nn.Sequential(conv), CPU) == torch.contiguous_format
    network = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1))
    assert place(network, CPU, plain=True) == torch.contiguous_format
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert place(network, CPU) == torch.contiguous_format
    assert type(network[0]) is nn.Conv2d


def test_after_inference_mode_and_on_other_default_devices():
    """The scratch memory is made at the first call and kept: it must do for all later ones."""
    x, w = torch.randn(1, 300, 34, 32), torch.randn(3, 300, 3, 3)  # larger than any before
    expected = F.conv2d(x, w, padding=1)

    def inference():
        with torch.inference_mode():
            return conv2d(x, w, None)

    def elsewhere():
        with torch.device("meta"):
            return conv2d(x, w.clone().requires_grad_(), None)

    for first in (inference, elsewhere):
        with ThreadPoolExecutor(1) as fresh:  # has no scratch memory yet
            for function in (first, elsewhere):
                torch.testing.assert_close(fresh.submit(function).result(), expected, rtol=1e-4, atol=1e-4)


def test_exported_it_is_plain():
    """Scratch memory would be part of the graph."""
    network = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1))
    assert use_winograd(network)
    assert use_winograd(network)  # as a network that is loaded, encoded with and trained on
    x = torch.randn(1, 256, 32, 32)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), network(x), rtol=1e-4, atol=1e-4)
