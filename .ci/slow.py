"""What takes too long, or is too rough, for a notebook: whole commands as a person runs them, killed and resumed.

Each function `test_*` runs in a process and an empty current folder of its own; see harness.py."""
import os, shutil, subprocess, sys, time, zipfile
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
