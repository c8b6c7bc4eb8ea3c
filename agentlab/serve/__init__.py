"""The agent behind an OpenAI-compatible endpoint: one engine, a fair queue, a champion that changes while it serves.

`agentlab.serve.server.serve` starts it; nothing is imported here, so that the dashboard is printed at once.
"""
