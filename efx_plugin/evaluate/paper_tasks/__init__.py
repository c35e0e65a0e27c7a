"""The tasks of the paper (arXiv 2511.19935) as lm-eval task files.

They are CaseHOLD, BillSum and ContractNLI; PubMedQA, MedNLI and HQS. Their data come from the hub, or from files in the
folder that `--task-data` names, in the same fields.
"""
