"""The networks of CMamba (Wu et al. 2025, arXiv 2502.04988), equation by equation.

From the paper's symbols to names here:

    g_a, g_s        `transforms.Analysis`, `Synthesis`: image to latent y and back
    h_a, h_s        `transforms.HyperAnalysis`, `HyperSynthesis`: y to z, and z_hat to Phi'
    CA-SSM          `blocks.CASSM`: F_ssm of `VSSBlock`, F_cnn of `ResBlock`, weights alpha, beta
    VSS, SS2D       `blocks.VSSBlock`, `ss2d.SS2D`: the global path, with the four-direction scan
    A, B, C, D, dt  of the scan: `ops.selective_scan_2d`; dt is Delta after softplus
    CAE             `context.CAE`: t, F_ssm and Phi_i of slice i; `ContextModel` loops over i
    LRP             `context.LRP`: latent residual prediction, y_bar = y_hat + LRP

Not in the paper: `gain` (one model for all qualities), `hadamard_init` (initial weights), `bypass`
(a linear path), `ablations` (blocks to compare the paper's with), `float64_layers` (layers that
are also fast in float64) and `tiled` (the same modules on large maps in bounded memory).

Shapes are `[B, C, H, W]`; inside SS2D and CAE channels come last, `[B, H, W, C]`.
"""
