"""Whether reconstructions keep what a radiologist looks for: boxes of fastMRI+, and planted lesions."""
