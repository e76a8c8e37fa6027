"""The quality lab: what merging does to images, measured; and the ratios that change them least.

Nothing here is imported by ``import toma_fx``; the commands ``toma-fx eval`` and ``calibrate``
load it, and so do ``demo`` and ``app``, to draw. ``pip install toma-fx[lab]`` installs what
``eval`` needs.

Shape suffixes: ``P`` prompts, ``S`` seeds, ``N`` image tokens or images, ``D`` width, ``K``
clusters.
"""
