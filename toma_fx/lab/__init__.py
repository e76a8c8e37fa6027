"""The quality lab measures how merging changes images, and finds the ratios that change them least.

``import toma_fx`` imports nothing of it. The commands ``toma-fx eval`` and ``calibrate`` load it,
and ``demo`` and ``app`` draw with it. ``pip install toma-fx[lab]`` installs the packages that
``eval`` needs.

Shape suffixes: ``P`` prompts, ``S`` seeds, ``N`` image tokens or images, ``D`` width, ``K``
clusters.
"""
