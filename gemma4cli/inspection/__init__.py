"""Looking into exported programs: any `.pte` and `.ptd`, and the GPU code inside, without loading or running them."""
