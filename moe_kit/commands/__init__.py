"""The commands of `moe-kit`, one module each; every module has `main(arguments)` and loads torch only inside it."""
