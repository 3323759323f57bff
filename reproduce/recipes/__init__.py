"""Recipes that come with the package: what `autodropout search NAME` trains, a file each."""
