"""The shared vocabulary: tasks, samples, bundles, preprocessing, policy. Imports protos and nothing else of ours, never torch."""
