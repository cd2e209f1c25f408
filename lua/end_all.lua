-- Ends sessions of a subject, all at one moment.
--   KEYS[1]     the subject's index
--   KEYS[2..]   the sessions' hashes, as the index listed them
--   ARGV[1]     the id of a session to keep, or ''
--   ARGV[2]     when they were listed: 16 digits of microseconds since 1970, the server's time
--   ARGV[3]     how many realms there are
--   ARGV[4..]   each realm .. the subject; then the index entry of each of KEYS[2..]
--   ARGV[last]  echo, behind every reply
-- Returns how many ended .. ':' .. index entries .. echo: those of sessions that were started before
-- they were listed, but not under an id of KEYS[2..]: renewals moved them meanwhile.
-- Errors: INCOMPLETE.
local index, echo, kept, listed, realms = KEYS[1], ARGV[#ARGV], ARGV[1], ARGV[2], tonumber(ARGV[3])

-- If the network lost a digit of how many words there are, the last ones are missing.
if #ARGV ~= 3 + realms + #KEYS then return redis.error_reply('INCOMPLETE ' .. echo) end
local ours, known, gone, ended = {}, {}, {}, 0
for i = 4, 3 + realms do ours[ARGV[i]] = true end
for i = 2, #KEYS do
  local session, entry = KEYS[i], ARGV[2 + realms + i]
  local sub = redis.call('HGET', session, 'sub')
  known[entry] = true
  if not sub then
    gone[#gone + 1] = entry
  elseif ours[sub] and string.sub(entry, 17) ~= kept then
    local deleted = redis.pcall('UNLINK', session)
    if deleted ~= 1 then return redis.error_reply(deleted.err .. ' ' .. echo) end
    ended = ended + 1
    gone[#gone + 1] = entry
  end
end
local left = redis.call('ZCARD', index)
for i = 1, #gone, 1000 do
  left = left - redis.call('ZREM', index, unpack(gone, i, math.min(i + 999, #gone)))
end
-- (alike in every script) Entries that are older than the list and not on it: renewals gave their
-- sessions other ids meanwhile.
local moved = {}
for _, entry in ipairs(left > 0 and redis.call('ZRANGE', index, 0, -1) or {}) do
  if not known[entry] and string.sub(entry, 1, 16) <= listed then moved[#moved + 1] = entry end
end
-- (alike in every script) The index ends with the last of its sessions. If there is none left, it is
-- gone, and in a slot that moves what is gone cannot be asked again.
local last = left > 0 and redis.call('ZREVRANGE', index, 0, 0, 'WITHSCORES')[2]
if last then redis.call('PEXPIREAT', index, last) end
return ended .. ':' .. table.concat(moved) .. echo
