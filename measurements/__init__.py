"""The auditor's tools: what a release must measure to. Pure functions of artefacts, no hardware."""
