def train(plan, adversary=False):
    pass
