"""Operations with one definition (`reference.py`) and backends for particular hardware."""
