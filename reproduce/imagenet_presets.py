"""The settings of table 1: what each preset trains, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .imagenet_data import PROXY_TRAIN
from .imagenet_data import PROXY_VALID
from .imagenet_training import ImageNetRecipe
from .imagenet_uda import ImageNetUdaRecipe
from .models.imagenet import DEMO

IMAGENET_TRAIN, IMAGENET_CLASSES = 1_281_167, 1000


@dataclass(frozen=True)
class Preset:
    """`recipes`: by network, the first being the default; `micro_batch` there is the most that a rank takes at once,
    `ranks` and `augment` are filled in. `final_on_all`: whether final models train on all training images."""

    recipes: tuple[ImageNetRecipe, ...]
    train_images: int
    valid_images: int
    final_on_all: bool
    seeds: int
    tuning_seeds: int
    threads: int | None
    policy: str
    cost: str


def _paper_recipe(
    model: str, epochs: int, micro_batch: int, weight_decay: float, average: float | None
) -> ImageNetRecipe:
    """The paper does not say how it trains. Ours: 0.1 per 256 images, as is usual for SGD; 270 epochs for ResNet-50 as
    in DropBlock's paper; 350 epochs, weight decay and moving average of the EfficientNets' paper for those (which used
    RMSProp); micro-batches that fit 80 GB."""
    return ImageNetRecipe(
        model,
        epochs,
        batch_size=1024,
        micro_batch=micro_batch,
        ranks=1,
        learning_rate=0.4,
        warmup=5,
        weight_decay=weight_decay,
        average=average,
        augment="none",
    )


RECIPES = (
    _paper_recipe("resnet50", 270, 256, 1e-4, None),
    _paper_recipe("efficientnet_b0", 350, 256, 1e-5, 0.9999),
    _paper_recipe("efficientnet_b7", 350, 32, 1e-5, 0.9999),
)
PRESETS = {
    "demo": Preset(
        (
            ImageNetRecipe(
                DEMO,
                epochs=20,
                batch_size=20,
                micro_batch=20,
                ranks=1,
                learning_rate=0.05,
                warmup=3,
                weight_decay=5e-4,
                average=None,
                augment="none",
            ),
        ),
        train_images=100,
        valid_images=500,
        final_on_all=False,
        seeds=3,
        tuning_seeds=1,
        threads=1,
        policy="hand-v0",
        cost="33 models, offline (measured: 4 min 29 s on two CPU cores, beside two other trainings)",
    ),
    "proxy": Preset(
        RECIPES,
        PROXY_TRAIN,
        PROXY_VALID,
        final_on_all=False,
        seeds=3,
        tuning_seeds=1,
        threads=None,
        policy="hand-v0",
        cost="ResNet-50: 33 models on the paper's 80,000 images of the search; GPU days; not measured",
    ),
    "paper": Preset(
        RECIPES,
        PROXY_TRAIN,
        PROXY_VALID,
        final_on_all=True,
        seeds=3,
        tuning_seeds=1,
        threads=None,
        policy="hand-v0",
        cost="ResNet-50: 15 models on 80,000 images and 18 on all; GPU weeks; not measured",
    ),
}

# With --labels. Temperature and confidence of ResNet-50 are those of UDA's paper. Batches (512 and 30 times as many),
# learning rate and number of steps (40,000) are those that an independent implementation
# (github.com/Jongchan/unsupervised_data_augmentation_pytorch) names for the paper's experiment, not checked against the
# paper. Warm-up, decay, lambda around 1 and no annealing are ours.
LABEL_RECIPE = ImageNetUdaRecipe(
    "resnet50",
    epochs=533,
    batch_size=512,
    micro_batch=8,
    ranks=1,
    learning_rate=0.3,
    warmup=5,
    weight_decay=1e-4,
    average=None,
    augment="none",
    unlabelled=30,
    strong_augment="none",
)
LABEL_PRESETS = {
    # A tenth of 100 images would be one image a class: too little for the question, so more of the digits take part.
    "demo": dataclasses.replace(
        PRESETS["demo"],
        recipes=(
            ImageNetUdaRecipe(
                DEMO,
                epochs=12,
                batch_size=10,
                micro_batch=10,
                ranks=1,
                learning_rate=0.05,
                warmup=2,
                weight_decay=5e-4,
                average=None,
                augment="none",
                unlabelled=4,
                strong_augment="none",
                confidence=0.8,
            ),
        ),
        train_images=500,
        valid_images=200,
        seeds=5,
        cost="40 models, offline (measured: 9 min 18 s on two CPU cores, beside another program)",
    ),
    "proxy": dataclasses.replace(
        PRESETS["proxy"],
        recipes=(LABEL_RECIPE,),
        cost="30 models of ResNet-50 on the paper's 80,000 images of the search; GPU days; not measured",
    ),
    "paper": dataclasses.replace(
        PRESETS["paper"],
        recipes=(LABEL_RECIPE,),
        cost="ResNet-50: 15 models on 80,000 images and 15 on all; GPU weeks; not measured",
    ),
}
