"""The networks of the experiments that torchvision and timm do not have."""
