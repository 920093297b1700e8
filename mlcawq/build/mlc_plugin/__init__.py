"""What runs inside an interpreter that has mlc_llm: its three steps, with AWQ that works.

`python -m mlcawq.build.mlc_plugin {gen_config,convert_weight,compile} …` takes mlc_llm's own
arguments. No file of mlc_llm is edited: its registries get entries, and module globals of it are
replaced before a step runs. Nothing here needs more than numpy, TVM, mlc_llm and what mlc_llm
itself requires, and only modules that are imported for a step import them.
"""
