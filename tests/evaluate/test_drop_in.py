"""Our exported model under the released CytoSyn's call, as LazySlide and the card make it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_data import DIM, DOOR_PX
from PIL import Image

from common.errors import UserError
from evaluate.generators.pipeline import CytoSynPipeline
from model import CytoSyn


@pytest.fixture(scope="module")
def pipeline(model: Path) -> CytoSynPipeline:
    # The arguments of an existing call stay as they are.
    return CytoSynPipeline.from_pretrained(
        str(model), custom_pipeline=str(model), trust_remote_code=True, torch_dtype=torch.float32
    ).to("cpu")


def embeds(count: int) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(0))


def test_the_published_calls_give_pil_images(pipeline: CytoSynPipeline) -> None:
    free = pipeline(num_images_per_prompt=3, num_inference_steps=2, guidance_scale=1.0)["images"]
    guided = pipeline(
        h0_mini_embeds=embeds(2),
        num_images_per_prompt=2,
        num_inference_steps=2,
        guidance_scale=2.5,
        guidance_low=0.0,
        guidance_high=0.75,
    )
    assert (len(free), len(guided["images"])) == (3, 4)
    assert guided.images is guided["images"] is guided[0]
    for image in [*free, *guided.images]:
        assert isinstance(image, Image.Image)
        assert (image.size, image.mode) == ((DOOR_PX, DOOR_PX), "RGB")


def test_images_are_the_models_under_seeds_of_the_generator(
    pipeline: CytoSynPipeline, model: Path
) -> None:
    def run(**more: object) -> np.ndarray:
        generator = torch.Generator().manual_seed(5)
        return pipeline(embeds(2), num_inference_steps=2, generator=generator, **more).images

    seeds = torch.randint(2**63 - 1, (2,), generator=torch.Generator().manual_seed(5))
    expected = CytoSyn.from_pretrained(model).generate(
        embeds(2), num_inference_steps=2, seed=seeds, batch_size=2
    )
    assert (np.stack([np.array(image) for image in run()]) == expected).all()
    np.testing.assert_allclose(run(output_type="np") * 255, expected, atol=1e-4)
    channels_first = run(output_type="pt").permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(channels_first * 255, expected, atol=1e-4)


def test_a_seed_is_a_generator_of_that_seed(pipeline: CytoSynPipeline) -> None:
    def run(**seeding: object) -> bytes:
        return pipeline(embeds(1), num_inference_steps=1, **seeding).images[0].tobytes()

    assert run(seed=5) == run(seed=5) == run(generator=torch.Generator().manual_seed(5))
    assert run(seed=6) != run(seed=5)
    with pytest.raises(UserError, match="generator= or seed=, not both"):
        run(seed=5, generator=torch.Generator())


def test_every_shape_of_embedding_that_is_in_use(pipeline: CytoSynPipeline) -> None:
    def run(given: torch.Tensor) -> bytes:
        generator = [torch.Generator().manual_seed(1)]
        return pipeline(given, num_inference_steps=1, generator=generator).images[0].tobytes()

    one = embeds(1)
    assert run(one) == run(one[0]) == run(one[:, None]) == run(one.double())


def test_mistakes_are_named(pipeline: CytoSynPipeline) -> None:
    with pytest.raises(UserError, match=r"features are \[1, 5\]; this model expects \[n, 12\]"):
        pipeline(torch.zeros(1, 5))
    with pytest.raises(UserError, match="2 generators for 1 images"):
        pipeline(embeds(1), generator=[torch.Generator()] * 2)
    with pytest.raises(UserError, match="expected pil, np or pt"):
        pipeline(embeds(1), num_inference_steps=1, output_type="latent")  # type: ignore[arg-type]
