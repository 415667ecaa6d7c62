"""Components that several families share; not a family itself."""
