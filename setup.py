"Package metadata, read from settings.ini; pyproject.toml names these fields as dynamic"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=['='])
settings.read('settings.ini', encoding='utf-8')
settings = settings['DEFAULT']
lib = settings['lib_path']
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature',
            '7 - Inactive']

setup(
    name=lib,
    version=settings['version'],
    description=settings['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=settings['keywords'],
    author=settings['author'],
    author_email=settings['author_email'],
    license=settings['license'],
    classifiers=[
        f"Development Status :: {statuses[int(settings['status']) - 1]}",
        f"Intended Audience :: {settings['audience']}",
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=[lib, f'{lib}.*']),
    install_requires=settings['requirements'].split(),
    extras_require={extra: settings[f'{extra}_requirements'].split() for extra in ('dev', 'tune', 'pretrained')},
    package_data={lib: ['py.typed']},
    entry_points={'nbdev': [f'{lib}={lib}._modidx:d']},
)
