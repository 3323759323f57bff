"""Maps the top-level folders onto one package.

A top-level package called `kernels` would shadow Hugging Face's, so the folder is installed as `autodropout.kernels`,
and `reproduce/` as `autodropout.reproduce`. Everything else is in pyproject.toml.
"""

from setuptools import find_packages
from setuptools import setup

FOLDERS = {"autodropout": "autodropout", "autodropout.kernels": "kernels", "autodropout.reproduce": "reproduce"}

setup(
    package_dir=FOLDERS,
    packages=sorted(
        set(FOLDERS)
        | {f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(folder)}
    ),
)
