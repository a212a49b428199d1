"""What takes too long, or is too rough, for a notebook: whole commands as a person runs them, killed and resumed.

Each function `test_*` runs in a process and an empty current folder of its own; see harness.py."""
import json, os, shutil, subprocess, sys, time, zipfile
from pathlib import Path
from harness import ROOT

def sh(*cmd, status=0, **env):
    "Runs a command to its end and returns what it printed; fails when its exit status is another than `status`"
    done = subprocess.run([str(o) for o in cmd], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print('$', *cmd, done.stdout, sep=' ')
    assert done.returncode == status, f'exit status {done.returncode}, expected {status}'
    return done.stdout

def wait_for(condition, limit=300):
    "Waits until `condition()` is true"
    end = time.time() + limit
    while not condition():
        assert time.time() < end, f'waited {limit} s in vain'
        time.sleep(.05)

def test_wheel_holds_the_library():
    "The wheel is pure Python, and its commands import from inside the zip, as Kaggle does with it"
    shutil.copytree(ROOT, 'clone', symlinks=True, ignore=shutil.ignore_patterns('.git', 'build', 'runs', '_proc', '_docs', '*.egg-info'))
    sh(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', 'dist', './clone')
    [wheel] = Path('dist').glob('sdip-*-py3-none-any.whl')
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/'sdip').rglob('*.py')}
    assert modules <= set(zipfile.ZipFile(wheel).namelist()), 'the wheel lacks modules'
    out = sh(sys.executable, '-c', 'import sdip.cli; print(sdip.cli.__file__)', PYTHONPATH=str(wheel.resolve()))
    assert '.whl' in out, f'sdip was imported from {out}'

def test_generate():
    "One picture from a prompt; then a data set, killed at its start and finished by the same command again"
    sh('sdip_generate', 'owl.png', '--prompt', 'a white owl at night, 8k')
    assert Path('owl.png').read_bytes()[:4] == b'\x89PNG'
    assert 'no known subject' in sh('sdip_generate', 'x.png', '--prompt', 'nothing at all', status=1) and not Path('x.png').exists()
    command = 'sdip_generate', 'world', '--n', 300
    first = subprocess.Popen([str(o) for o in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(Path('world').glob('images/[!.]*.png'))) > 20)
    first.kill()
    first.wait()
    assert not Path('world/pairs.parquet').exists(), 'it was done before it could be killed'
    kept = {p: p.stat().st_mtime_ns for p in Path('world').glob('images/[!.]*.png')}
    sh(*command)
    assert Path('world/pairs.parquet').exists() and len(list(Path('world').glob('images/[!.]*.png'))) == 600 + 30 + 60
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'pictures that were complete were drawn again'

def test_dedup():
    "A table with an exact duplicate and an empty prompt comes out with each distinct prompt once"
    Path('prompts.csv').write_text('prompt,likes\na red cat on a beach,3\nA red cat on a  beach,4\na blue robot in a forest,1\n,2\n')
    sh('sdip_dedup', 'prompts.csv', '--out', 'kept.csv', '--dropped', 'gone.csv')
    assert Path('kept.csv').read_text() == 'prompt,likes\na red cat on a beach,3\na blue robot in a forest,1\n'
    assert len(Path('gone.csv').read_text().splitlines()) == 3
    assert 'x.txt is neither .csv nor .parquet' in sh('sdip_dedup', 'prompts.csv', '--out', 'x.txt', status=1)

RUN = 'sdip_run', '--preset', 'tiny', '--out', 'run'

def scores(): return json.loads(Path('run/scores.json').read_text())['test']

def stopped_at(line):
    "Starts the run, kills it as soon as it has printed `line`, and returns the receipts that stand by then"
    out = Path('log.txt')
    with out.open('w') as f: first = subprocess.Popen(RUN, stdout=f, stderr=subprocess.STDOUT)
    wait_for(lambda: line in out.read_text())
    first.kill()
    first.wait()
    return {p: p.stat().st_mtime_ns for p in Path('run/receipts').glob('*.json')}

def test_run_killed_at_three_stages():
    "Killed while it draws, while it trains and while it blends, a run does only what is missing, and ends with the same scores"
    sh(*RUN)
    whole = scores()
    shutil.rmtree('run')
    done = 0
    for line in 'MiniLM embeddings of the prompts ...', 'CLIP regressor ...', 'Ensemble ...':
        kept = stopped_at(line)
        assert len(kept) > done, f'nothing was done between two kills: {kept}'
        done = len(kept)
        assert not Path('run/scores.json').exists()
    out = sh(*RUN)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), 'a finished stage was done again'
    assert out.count('done before') == len(kept)
    assert not list(Path('run').rglob('.tmp-*')), 'what the killed runs left half-written is still there'
    for name, score in whole.items(): assert abs(scores()[name] - score) < 1e-4, (name, score, scores()[name])
    assert sh(*RUN).count('done before') == len(list(Path('run/receipts').glob('*.json')))
    assert 'seed: the folder has 0, this call says 1' in sh(*RUN, '--seed', 1, status=1)

def test_predict():
    "A folder with good pictures, a broken one and a text file; then places that cannot be used, each with a reason"
    sh(*RUN)
    Path('in').mkdir()
    for i, prompt in enumerate(('a red cat', 'two blue boats at night')): sh('sdip_generate', f'in/{i}.png', '--prompt', prompt)
    Path('in/broken.jpg').write_bytes(Path('in/0.png').read_bytes()[:200])
    Path('in/notes.txt').write_text('not a picture')
    out = sh('sdip_predict', 'in', '--run', 'run', '--out', 'submission.csv')
    assert 'broken.jpg' in out and '3 pictures, 1 of them filled' in out and 'know nothing of real pictures' in out
    assert 'good, 3 images' in sh('sdip_submit', 'check', 'submission.csv', '--images', 'in')
    shutil.copy('submission.csv', 'truth.csv')
    assert 'score 1.0000' in sh('sdip_predict', 'in', '--run', 'run', '--out', 'again.csv', '--truth', 'truth.csv')
    Path('empty').mkdir()
    for command, reason in ((('empty', '--run', 'run'), 'empty'), (('in', '--run', 'nowhere'), 'holds neither'),
                            (('in', '--run', 'run', '--out', 'in/notes.txt/x.csv'), 'cannot write')):
        assert reason in sh('sdip_predict', *command, status=1)

def test_finetune_killed_in_mid_epoch():
    "kill -9 in the middle of an epoch: the same command goes on there, and ends within 1e-4 of a run that was left alone"
    import numpy as np, torch
    from sdip.data import find_images
    from sdip.finetune_vit import VitRegressor
    sh('sdip_generate', 'world', '--n', 200, '--seed', 3)
    command = lambda out, *more: ('sdip_finetune', 'vit', '--pairs', 'world', '--out', out, '--set', 'lr=1e-3', 'bs=8', 'minutes=0', 'timetable=((1, 1), (None, 2))', *more)
    sh(*command('whole'))
    first, file = subprocess.Popen([str(o) for o in command('killed')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), Path('killed/checkpoint.pt')
    place = lambda: (lambda s: (s['epoch'], s['batch']))(torch.load(file, weights_only=True)) if file.exists() else (0, 0)
    wait_for(lambda: place()[0] == 1 and 3 <= place()[1] <= 15)
    first.kill()                                                   # SIGKILL
    assert first.wait() == -9 and not Path('killed/config.json').exists(), 'it was done before it could be killed'
    assert place()[0] == 1 and 0 < place()[1] < 25, f'not in mid-epoch: {place()}'
    refused = sh(*command('killed', 'wd=0.1'), status=1)           # another recipe
    assert 'wd: it has 0.05, this run 0.1' in refused, refused
    sh(*command('killed'))
    pictures = find_images('world/images')[:50]
    whole, killed = (VitRegressor.load(f, device='cpu').predict(pictures) for f in ('whole', 'killed'))
    assert np.abs(whole - killed).max() < 1e-4, np.abs(whole - killed).max()
    logs = [[line.split(',')[:5] for line in Path(f, 'history.csv').read_text().splitlines()] for f in ('whole', 'killed')]
    assert [r[0] for r in logs[1]] == ['epoch', '0', '1', '2'] and np.abs(np.array(logs[0][1:], float) - np.array(logs[1][1:], float)).max() < 1e-4, logs
    assert sorted(p.name for p in Path('killed').iterdir()) == ['config.json', 'history.csv', 'model.safetensors', 'scores.json', 'targets']
    assert 'holds a finished model' in sh(*command('killed'), status=1)

TWO = '''
import os, numpy as np
import torch.distributed as dist
from sdip.data import find_images, load_pairs
from sdip.finetune_clip import Recipe, finetune
from sdip.finetune_vit import make_regressor
from sdip.training import share_among, world_of_processes
rank, world = world_of_processes()
assert world == int(os.environ.get('WORLD_SIZE', 1)), world
assert share_among([rank]) == list(range(world)), 'ranks'
reg = make_regressor('vit', device='cpu')
scores = finetune(reg, load_pairs('world'), f'out{world}', Recipe(lr=1e-3, bs=16, accumulate=2, timetable=((1, 1), (None, 1))), quiet=True)
pictures = find_images('world/images')[:33] + ['nothing.png']      # cannot be halved, and one cannot be read
shared = reg.predict(pictures, shared=True)
assert np.isnan(shared).any(1).tolist() == [False]*33 + [True] and [r['row'] for r in reg.report] == [33], reg.report
assert np.nanmax(np.abs(shared - reg.predict(pictures))) < 1e-6, 'shared predictions are not in the order of the rows'
np.save(f'pred{world}.{rank}.npy', shared[:33])
print('rank', rank, 'of', world, scores)
'''

def test_two_processes():
    "torchrun with two CPU processes: both know of each other, end with the weights of one process, and predict in row order"
    import numpy as np
    sh('sdip_generate', 'world', '--n', 150, '--seed', 4)
    Path('two.py').write_text(TWO)
    sh(sys.executable, 'two.py')
    out = sh(sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', 2, '--master_port', 29_713, 'two.py')
    assert 'rank 0 of 2' in out and 'rank 1 of 2' in out, out
    one, *two = (np.load(f'pred{n}.npy') for n in ('1.0', '2.0', '2.1'))
    assert np.array_equal(*two), 'the two processes ended with different weights'
    assert np.abs(one - two[0]).max() < 1e-3, np.abs(one - two[0]).max()
    assert Path('out2/config.json').exists() and json.loads(Path('out1/scores.json').read_text()).keys() == json.loads(Path('out2/scores.json').read_text()).keys()
