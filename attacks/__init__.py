"""vmoe-attack: attacks on twins, judged on twins and on what was deployed from them.

One attack on some clips (float [B, 3, T, H, W], pixels in [0, 1]):

    from vmoe.attacks.methods import j_tlga
    found = j_tlga.attack(twin, clip, label, j_tlga.Settings(eps=8 / 255, steps=20))
    found.adversarial, found.success, found.route_after

Several, with every route_grad, rounded to uint8 and then judged by twin and engine:

    from vmoe.attacks.evaluate import evaluate, plan
    from vmoe.attacks.judge import of_twin
    rows = plan(["pgd", "tlga-r", "j-tlga"], [8 / 255])
    judges = {"twin": of_twin(twin), "engine": engine.infer}
    found = evaluate(twin, clips, label, rows, judges)      # clips: uint8 [N, T, H, W, 3]
"""
