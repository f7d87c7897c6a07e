def report(*a):
    return {}


def markdown(r):
    return ""
