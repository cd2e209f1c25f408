-- Does nothing: its reply shows that a connection has kept its place.
--   ARGV[1]  echo
-- Returns echo.
return ARGV[1]
