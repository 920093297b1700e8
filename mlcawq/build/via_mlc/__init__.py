"""The three steps of a build through mlc_llm, which is reached in an interpreter of its own."""
