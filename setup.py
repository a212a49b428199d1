"Everything stands in settings.ini; this file only hands it to setuptools."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

end = '_requirements'
extras = {k.removesuffix(end): shlex.split(v) for k, v in cfg.items() if k.endswith(end)}
extras['dev'] = sum(extras.values(), [])
setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_namespace_packages(include=['sdip', 'sdip.*']), include_package_data=True, zip_safe=True,
    package_data=dict(sdip=['weights/*.md', 'weights/*/*']),
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg['requirements']),
    extras_require=extras,
    entry_points=dict(console_scripts=shlex.split(cfg['console_scripts']), nbdev=['sdip=sdip._modidx:d']),
)
