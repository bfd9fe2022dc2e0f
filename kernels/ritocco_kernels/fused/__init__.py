"""The operations of `ritocco_kernels` as Triton kernels, one file per operation, named as its reference's."""
