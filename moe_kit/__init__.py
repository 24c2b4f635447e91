"""moe_kit: routed adapters, expert routers and layer routers for Hugging Face models."""
