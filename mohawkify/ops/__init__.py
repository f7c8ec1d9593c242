"""The operators of the Discrete Mamba-2 mixer: one public function per job, each with a plain reference."""
