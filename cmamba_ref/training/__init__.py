"""Training of CMamba models: the parts that the command `tools/train.py` puts together.

    settings      what a run is: defaults, a TOML file, the command line
    draws         every random decision, as a function of the seed and its place in the run
    data          images to batches of crops, on threads
    graphics      text, shapes and screenshots, drawn
    schedule      learning rate, crop size and batch size at a point of the run
    distributed   several processes, or one
    objective     the loss, weighted over rates
    soap          an optimiser: Adam in the eigenbases of the gradient's covariances
    averages      averages of many tensors at once
    step_graph    forward and backward of a step as one CUDA graph
    trainer       one optimiser step after the other; what is saved
    clock         where the time of a step goes
    profiling     which parts of the model the time of a step goes to
    checkpoints   files that survive a kill, and are checked before they are used
    validation    rate and distortion of held-out images
    log           a JSON line per record

Nothing here is imported by `import cmamba_ref`.
"""
