r"""Dynamic graph message passing: every pixel gathers nine predicted places in each of several dilated neighbourhoods, by weights predicted too.

    out = x + sum_s gamma_s m_s,   m_s[c, p] = sum_t W_s[g(c), t, p] x[c, p + rho_s t + o_st(p)]
    o_s = conv3x3(x, dilation rho_s),   (f_s, a_s) = a convolution over the sampled pixels,   W_s = f_s softmax_t(a_s)

Zhang, Xu, Arnab, Torr, "Dynamic Graph Message Passing Networks", CVPR 2020. arXiv:1908.06955.
Following the authors' code, f_s is not normalised when there is an affinity a_s; their fourth branch reads its affinity from the last nine filter
channels (official_affinity4). Not in the code: offsets start at zero, init="identity", any number of dilations.
B batch, C channels (a quarter of them in a bottleneck), H, W the map's sides, t the 3 x 3 taps, g(c) the group of channel c, rho_s the dilations.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.deform import deform_apply, deform_conv2d, deform_unfold
from ...ops.local_window import Window, window_apply
from ...parts.gates import INITS
from ...validate import check_divisible, check_map, check_option

TAPS = 9
MODES = ("deformatt", "deform", "none")


class DynamicGraphMessagePassing(Mechanism):
    """Args:
    channels: of the input and the output.
    groups: groups of contiguous channels with filters of their own.
    dilations: one branch for each.
    deform: "deformatt" (predicted places, filters and affinities), "deform" (no affinities, filters normalised) or "none" (the regular taps).
    variant: "rigorous" predicts filters from the sampled pixels and adds the branches with gains; "fast" predicts all with one plain convolution and
        merges the branches by a 1x1 convolution.
    bottleneck: work on channels // 4, between two 1x1 convolutions.
    norm_groups: of the group norms of "fast" and of the bottleneck.
    official_affinity4: let the fourth branch of "rigorous" read its affinity where the authors' code does; False for the paper's form.
    shuffle: in training, give the groups each other's filters at random.
    offset_init: "zero" starts on the regular taps, "default" as any convolution.
    init: "identity" starts with gains of zero; "fast" and the bottleneck then have one, `gain`, on the whole branch.
    """

    card: ClassVar = Card(
        id="dgmn",
        layout="map",
        paper=Paper(
            title="Dynamic Graph Message Passing Networks",
            authors="Li Zhang, Dan Xu, Anurag Arnab, Philip H. S. Torr",
            venue="CVPR",
            year=2020,
            arxiv="1908.06955",
        ),
        source="lzrobots/dgmn@515476b maskrcnn_benchmark/layers/dynamic_weight.py (MIT)",
        summary="Each pixel gathers a few predicted places at several dilations, with predicted filters and affinities.",
        when="Wide context inside a detection or segmentation backbone at the cost of a few convolutions; maps too large for all pairs of pixels.",
        flops="2*B*N*9*width*branches*(9*groups + (9 if deform == 'deformatt' else 0)"
        " + (1 if deform == 'none' else 22 if variant == 'fast' else 26))"
        " + (2*B*N*width**2*(branches + 1) if variant == 'fast' else 0) + (4*B*N*channels*width if bottleneck else 0)",
        grows={"N": 1.0},
        can=frozenset({"linear", "identity_start"}),
        checked_against="authors",
        uncertain="The authors' CUDA operators were replaced by a literal translation; `fast` is compared with formulas alone.",
        example={"channels": 8, "groups": 2},
        variants=(
            {"channels": 8, "dilations": (1, 3), "deform": "deform", "offset_init": "default"},
            {"channels": 8, "groups": 4, "dilations": (1, 2), "deform": "none"},
            {"channels": 16, "groups": 2, "dilations": (2, 1, 3), "variant": "fast", "bottleneck": True, "norm_groups": 2, "offset_init": "default"},
            {"channels": 16, "dilations": (1, 2, 3, 4), "bottleneck": True, "norm_groups": 2, "official_affinity4": False},
        ),
        place="C",
    )
    official: ClassVar = (
        KeyMap(
            "lzrobots/dgmn",
            (
                *(rename(f"off_conv{letter}.*", f"offset_convs.{i}.*") for i, letter in enumerate("abcd")),
                *(rename(f"kernel_conv{letter}.*", f"filter_convs.{i}.*") for i, letter in enumerate("abcd")),
                *(rename(f"cat{letter}.*", f"joint_convs.{i}.*") for i, letter in enumerate("abcd")),
                *(rename(f"gamma{i + 1}", f"gammas.{i}") for i in range(4)),
            ),
        ),
    )
    functions: ClassVar = {"unfold": deform_unfold, "conv": deform_conv2d}

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        dilations: Sequence[int] = (1, 4, 8, 12),
        deform: Literal["deformatt", "deform", "none"] = "deformatt",
        variant: Literal["rigorous", "fast"] = "rigorous",
        bottleneck: bool = False,
        norm_groups: int = 32,
        official_affinity4: bool = True,
        shuffle: bool = False,
        offset_init: Literal["zero", "default"] = "zero",
        *,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(deform, MODES, "deform")
        check_option(variant, ("rigorous", "fast"), "variant")
        check_option(offset_init, ("zero", "default"), "offset_init")
        check_option(init, INITS, "init")
        dilations = tuple(dilations)
        require(len(dilations) > 0 and min(dilations) > 0, "dilations={} must be at least one, each at least 1", dilations)
        if bottleneck:
            check_divisible(channels, 4, "channels", "the bottleneck")
        width = channels // 4 if bottleneck else channels
        check_divisible(width, groups, "channels // 4" if bottleneck else "channels", "groups")
        if bottleneck or variant == "fast":
            check_divisible(width, norm_groups, "channels // 4" if bottleneck else "channels", "norm_groups")
        self.channels, self.groups, self.dilations, self.deform, self.variant = channels, groups, dilations, deform, variant
        self.bottleneck, self.norm_groups, self.official_affinity4 = bottleneck, norm_groups, official_affinity4
        self.shuffle, self.offset_init, self.init = shuffle, offset_init, init
        self.width, self.branches = width, len(dilations)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        filters = TAPS * groups + (TAPS if deform == "deformatt" else 0)
        joint = filters + (2 * TAPS if deform != "none" else 0)
        separate = variant == "rigorous" and deform != "none"

        def convolutions(out: int, wanted: bool) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(width, out, 3, padding=r, dilation=r, bias=False, **dd) for r in dilations if wanted)

        def merge(wide: int, out: int, bias: bool = False) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(wide, out, 1, bias=bias, **dd), nn.GroupNorm(norm_groups, out, **dd), nn.ReLU())

        self.offset_convs, self.filter_convs = convolutions(2 * TAPS, separate), convolutions(filters, separate)
        self.joint_convs = convolutions(joint, not separate)
        start = 0.0 if init == "identity" and not bottleneck else 1.0
        self.gammas = nn.ParameterList(torch.full((1,), start, **dd) for _ in dilations if variant == "rigorous")
        self.scale1 = merge(channels, width) if bottleneck else None
        self.scale2 = merge((self.branches + 1) * width, width, not bottleneck) if variant == "fast" else None
        self.scale3 = merge(width, channels) if bottleneck else None
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" and (bottleneck or variant == "fast") else None
        if offset_init == "zero" and deform != "none":
            first = 0 if separate else TAPS * groups
            for conv in self.offset_convs if separate else self.joint_convs:
                assert isinstance(conv, nn.Conv2d)
                nn.init.zeros_(conv.weight[first : first + 2 * TAPS])

    def key_maps(self) -> tuple[KeyMap, ...]:
        return self.official if len(self.dilations) == 4 else ()

    def forward(self, x: Float[Tensor, "b channels h w"], *, group_perms: Sequence[Tensor] | None = None) -> Float[Tensor, "b channels h w"]:
        """`group_perms`: with `shuffle`, for each branch the permutation (groups,) of its filters; drawn from the default generator if None."""
        check_map(x, self.channels)
        if self.bottleneck or self.variant == "fast":
            values = x.shape[0] * x.shape[2] * x.shape[3] * (self.width // self.norm_groups)
            require(values != 1, "norm_groups={} leaves each norm one value of {}; use fewer", self.norm_groups, tuple(x.shape))
        perms = self._permutations(group_perms, x.device)
        if self.deform != "none" and self.variant == "rigorous" and not self.bottleneck:  # group norms of such maps do not work under vmap
            x = x.contiguous(memory_format=torch.channels_last)  # as samples are gathered
        y = x if self.scale1 is None else self.scale1(x)
        messages = [self._message(y, i, perm) for i, perm in enumerate(perms)]
        if self.scale2 is not None:
            out = self.scale2(torch.cat([y, *messages], 1))
        else:
            out = y
            for gamma, message in zip(self.gammas, messages, strict=True):
                out = torch.addcmul(out, gamma.to(out.dtype), message)
        if self.scale3 is not None:
            out = self.scale3(out)
        if self.variant == "rigorous" and not self.bottleneck:
            return out
        return x + out if self.gain is None else torch.addcmul(x, self.gain, out)

    def _message(self, x: Tensor, branch: int, perm: Tensor | None) -> Tensor:
        """m_s (B, C, H, W)."""
        rho, wide = self.dilations[branch], TAPS * self.groups
        if self.deform == "none" or self.variant == "fast":
            parts = self.joint_convs[branch](x)
            offset, affinity = parts[:, wide : wide + 2 * TAPS], parts[:, wide + 2 * TAPS :]
        else:
            offset, conv = self.offset_convs[branch](x), self.filter_convs[branch]
            assert isinstance(conv, nn.Conv2d)
            parts = deform_conv2d(x, offset, conv.weight, padding=rho, dilation=rho)
            affinity = parts[:, wide - TAPS : wide] if branch == 3 and self.official_affinity4 else parts[:, wide:]
        filters, dtype = parts[:, :wide].unflatten(1, (self.groups, TAPS)), torch.promote_types(x.dtype, torch.float32)
        if self.deform != "deformatt" or self.variant == "fast":
            filters = filters.softmax(2, dtype)
        if perm is not None:
            filters = filters.index_select(1, perm)
        if self.deform == "none":
            return window_apply(filters.to(x.dtype), x, Window(3, dilation=rho))
        if self.deform == "deformatt":
            filters = filters * (affinity.sigmoid() if self.variant == "fast" else affinity.softmax(1, dtype)).unsqueeze(1)
        return deform_apply(filters, x, offset, 3, padding=rho, dilation=rho)

    def _permutations(self, given: Sequence[Tensor] | None, device: torch.device) -> list[Tensor | None]:
        if given is not None:
            require(self.shuffle, "group_perms needs a module made with shuffle=True")
            count = len(given)
            require(count == self.branches, "group_perms must be {} permutations, one for each branch, got {}", self.branches, count)
            for perm in given:
                wrong = tuple(perm.shape) != (self.groups,) or perm.is_floating_point()
                require(not wrong, "group_perms must be integer tensors of shape {}, got {} {}", (self.groups,), perm.dtype, tuple(perm.shape))
        if not (self.training and self.shuffle):
            return [None] * self.branches
        if given is None:
            return [torch.randperm(self.groups, device=device) for _ in self.dilations]
        return [perm.to(device) for perm in given]
