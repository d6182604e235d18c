"""File formats, one a module: :mod:`recon.io.fastmri` reads and writes fastMRI HDF5."""
